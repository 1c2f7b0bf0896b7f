"""The commands of `samestep` that look at runs and change nothing: status, logs, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.options import DEFAULT_RUNS_DIR, AsJson, RunArgument, RunsDir, complete_run, example, option
from launch.console import PipeSafeConsole, add_row, echo, emit, table_console
from launch.option_values import named, whole
from launch.untrusted_files import open_plain, printable

if TYPE_CHECKING:
    from launch.run.directory import RunDirectory

commands = typer.Typer()
_NO_RUNS = "{}: no runs yet; `samestep run` or `samestep submit` begins one"


@commands.command(epilog=example("samestep status", "samestep status embedded --json"))
def status(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN...]",
            parser=named("RUN"),
            help="Names of runs below --runs-dir, or their folders; none: all.",
            autocompletion=complete_run,
        ),
    ] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects, times in seconds.")] = False,
) -> None:
    """Show what runs do: state, step, speed, loss, newest valid checkpoint, expected end, restarts.

    Read from the run's folder, with Slurm's word where `scontrol` is there.
    """
    import json
    import time

    from launch.monitor.status import runs_below, status_of
    from launch.monitor.status_table import row
    from launch.run.find import find_run
    from launch.slurm.commands import show_job

    if not runs and not runs_dir.exists() and runs_dir == DEFAULT_RUNS_DIR:
        emit("[]") if as_json else echo(_NO_RUNS.format(runs_dir))
        return
    now = time.time()
    runs_shown = [find_run(run, runs_dir) for run in runs] if runs else runs_below(runs_dir)
    statuses = [status_of(run, show_job, now) for run in runs_shown]
    if as_json:
        emit(json.dumps([one.to_json() for one in statuses], indent=1))
        return
    if not statuses:
        echo(_NO_RUNS.format(runs_dir))
        return
    _show_table([row(one, now) for one in statuses])
    for note in (note for one in statuses for note in one.notes):
        echo(note)


@commands.command(epilog=example("samestep logs embedded --follow", "samestep logs embedded --rank 3"))
def logs(
    run: RunArgument,
    rank: Annotated[
        int | None, option("--rank", "R", "Only this rank's words, on whichever node it is.", whole, 0)
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Go on as it grows, from before its first word, until the run ends."
        ),
    ] = False,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Print the log of a run's newest attempt, of a Slurm job or of this machine."""
    import shutil
    import sys

    from launch.console import write_to_nowhere
    from launch.monitor.logs import log_files, no_log
    from launch.run.find import find_run
    from launch.run.lock import lock_holder
    from launch.slurm.attempts import read_ledger

    place = find_run(run, runs_dir)
    files = log_files(place, rank)
    may_begin = read_ledger(place).job or lock_holder(place.path)
    if not files and not (follow and may_begin):
        raise no_log(place, rank)
    try:
        if follow:
            _follow(place, rank)
            return
        for file in files:
            with open_plain(file) as handle:
                shutil.copyfileobj(handle, sys.stdout.buffer)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        write_to_nowhere(sys.stdout.fileno())


def _follow(run: RunDirectory, rank: int | None) -> None:
    """Until the run ends; what is not the log goes to stderr."""
    import sys
    import time

    from launch.monitor.follow import follow
    from launch.monitor.logs import end_of, log_files, never_spoke, waits_for
    from launch.slurm.commands import show_job

    spoken = False

    def write(words: bytes) -> None:
        nonlocal spoken
        spoken = True
        sys.stdout.buffer.write(words)
        sys.stdout.flush()

    ended = follow(
        lambda: log_files(run, rank),
        lambda: end_of(run, show_job, time.time()),
        write,
        lambda: echo(waits_for(run, show_job, time.time()), to_stderr=True),
    )
    echo(ended, to_stderr=True)
    if not spoken:
        raise never_spoke(run, rank)


def _show_table(rows: Sequence[Sequence[str]]) -> None:
    """The rows of `samestep status`, as many columns as the terminal has room for."""
    from rich.table import Table

    from launch.monitor.status_table import STATUS_COLUMNS, columns_for, has_room, missed, width_for

    console, table = PipeSafeConsole(highlight=False), Table()  # it says itself which columns have no room
    kept = columns_for(console.width, rows)
    may_fold = {"state"} if has_room(console.width, rows, kept) else {"run", "state"}
    for column in kept:
        table.add_column(
            STATUS_COLUMNS[column], overflow="fold", no_wrap=STATUS_COLUMNS[column] not in may_fold
        )
    for cells in rows:
        add_row(table, *(cells[column] for column in kept))
    console.print(table)
    if names := missed(rows, kept):
        needed = f"all need a terminal of {width_for(rows)} characters, {console.width} are here; see --json"
        console.print(f"not shown: {', '.join(names)} ({needed})", markup=False)


@commands.command(epilog=example("samestep checkpoints embedded"))
def checkpoints(run: RunArgument, runs_dir: RunsDir = DEFAULT_RUNS_DIR, as_json: AsJson = False) -> None:
    """Show the checkpoints of a run, and why it cannot go on from a damaged one. Reads every file.

    Ends with 1 when all that were published are damaged.
    """
    import json
    import time

    from rich.table import Table
    from rich.text import Text

    from launch.checkpoints.scan import scan_checkpoints
    from launch.monitor.checkpoint_table import (
        CHECKPOINT_COLUMNS,
        all_damaged,
        as_objects,
        reasons,
        table_rows,
    )
    from launch.run.find import find_run
    from launch.run.request_files import old_plan

    place = find_run(run, runs_dir, whole=False)
    console = table_console(to_stderr=as_json)
    with console.status("reading") as status:  # says nothing where nobody watches
        scanned = scan_checkpoints(place.path, telling=lambda folder: status.update(f"reading {folder.name}"))
    if as_json:
        emit(json.dumps(as_objects(scanned), indent=1))
        raise typer.Exit(int(all_damaged(scanned)))
    if not scanned and place.adapter.exists():
        echo(f"{place.path}: no checkpoint is left, its adapter is; to go on would be refused (see --fresh)")
        return
    if not scanned:
        echo(
            f"{place.path}: no checkpoint yet (see checkpoint.every_steps); start or resume it with `samestep run`"
        )
        return
    title = Text(printable(f"checkpoints of {place.name}"))
    table = Table(*CHECKPOINT_COLUMNS, title=title, title_justify="left")
    for row in table_rows(scanned, time.time()):
        add_row(table, *row)
    console.print(table)
    for line in reasons(scanned, old_plan(place)):
        echo(line)
    if all_damaged(scanned):
        raise typer.Exit(1)
