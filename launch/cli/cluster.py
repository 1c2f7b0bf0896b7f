"""The commands of `samestep` for a cluster: submit, status, logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.cli.options import (
    DEFAULT_RUNS_DIR,
    Allow,
    EarlyStop,
    Fresh,
    Overrides,
    RecipeArgument,
    RunArgument,
    RunName,
    RunsDir,
    Source,
    complete_run,
    example,
    memory_size,
    site_value,
    with_early_stop,
)
from launch.cli.tables import show_plan
from launch.console import add_row, echo, emit, table_console
from launch.invocation import command
from launch.option_values import named, one_of, place, several_of, text, whole, whole_numbers
from launch.slurm.attempts import MAX_CRASHES
from launch.untrusted_files import open_plain, printable

if TYPE_CHECKING:
    from launch.run.directory import RunDirectory
    from launch.slurm.submit import Submission

commands = typer.Typer()
_NO_RUNS = "{}: no runs yet; `samestep run` or `samestep submit` begins one"

StrategyFile = Annotated[
    str | None,
    typer.Option(
        help="A file of accelerate_configs/, without .yaml.", show_default="single for one process, else ddp"
    ),
]
SiteFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", parser=place("--site"), help="What differs between clusters: slurm/site.example.yaml."
    ),
]
# What follows wins over the site's file.
MemoryOfSite = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        parser=memory_size("--gpu-memory"),
        help="Memory of one GPU: 80GB.",
        show_default="the site's",
    ),
]


def as_of_sbatch(option: str) -> Any:
    """An option of sbatch's name and meaning."""
    return typer.Option(metavar="TEXT", parser=text(option), help="As of sbatch.", show_default="the site's")


TimeLimit = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        parser=site_value("--time", "time"),
        help="Limit of one attempt, as of sbatch: D-HH:MM:SS.",
        show_default="the site's",
    ),
]
Image = Annotated[
    str | None,
    typer.Option(
        metavar="IMAGE",
        parser=text("--container"),
        help="For the site's container.runtime.",
        show_default="the site's",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        parser=one_of("--device", ("cuda", "cpu")),
        help="What the nodes train on: cuda or cpu.",
        show_default="the site's, cuda",
    ),
]
SignalLead = Annotated[
    int | None,
    typer.Option(
        metavar="SECONDS",
        parser=whole("--signal-lead", 1, 65535),
        help="Warning before the time limit.",
        show_default="the site's, 120",
    ),
]
MaxCrashes = Annotated[
    int,
    typer.Option(
        metavar="N",
        parser=whole("--max-crashes", 1, 1000),
        help="Give up after N attempts in a row that save no step; dead nodes count half.",
    ),
]


@commands.command(
    epilog=example(
        "samestep submit qwen2vl_7b_chartqa --nodes 4 --gpus-per-node 8 --partition gpu --time 12:00:00",
        "samestep submit recipes/embedded.yaml --site site.yaml --then merge,evaluate",
        "samestep submit qwen2vl_7b_chartqa --nodes 1,2,4 --gpus-per-node 8 --doctor",
        "samestep submit qwen2vl_7b_chartqa --nodes 4 --gpus-per-node 8 --dry-run > job.sbatch",
    )
)
def submit(
    recipe: RecipeArgument,
    strategy: StrategyFile = None,
    nodes: Annotated[
        Any,  # several, which typer has no type for
        typer.Option(
            metavar="N[,N...]",
            parser=whole_numbers("--nodes", 1),
            help="Machines. Of several numbers each is a job of its own: the first that starts takes the run.",
        ),
    ] = 1,
    gpus_per_node: Annotated[
        int,
        typer.Option(metavar="N", parser=whole("--gpus-per-node", 1), help="Processes of a node, one a GPU."),
    ] = 1,
    site: SiteFile = None,
    gpu_memory: MemoryOfSite = None,
    partition: Annotated[str | None, as_of_sbatch("--partition")] = None,
    account: Annotated[str | None, as_of_sbatch("--account")] = None,
    qos: Annotated[str | None, as_of_sbatch("--qos")] = None,
    time: TimeLimit = None,
    constraint: Annotated[str | None, as_of_sbatch("--constraint")] = None,
    container: Image = None,
    device: Device = None,
    signal_lead: SignalLead = None,
    max_crashes: MaxCrashes = MAX_CRASHES,
    then: Annotated[
        str,
        typer.Option(
            metavar="JOBS",
            parser=several_of("--then", ("merge", "evaluate"), none=True),
            help="Jobs for when the run is done: merge, evaluate, or both with a comma.",
        ),
    ] = "",
    name: RunName = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    early_stop: EarlyStop = None,
    fresh: Fresh = False,
    allow: Allow = [],  # noqa: B006
    source: Source = None,
    doctor: Annotated[
        bool,
        typer.Option(
            "--doctor", help="Look at every node before the run trains; leave out those that are not fit."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the script, and the plan on stderr; queue and write nothing."),
    ] = False,
) -> None:
    """Queue a recipe's training on a Slurm cluster, on the login node. The job goes on until the run is done.

    Everything that can be refused is refused before the job is queued. `sbatch runs/NAME/submit.sbatch` queues the
    same again.
    """
    from launch.local import planned_run
    from launch.local.import_checkpoint import import_foreign_checkpoint
    from launch.slurm import submit as cluster
    from launch.slurm.site import load_site

    follow_ups = cluster.check_follow_ups(then)
    given = {"partition": partition, "account": account, "qos": qos, "time": time, "constraint": constraint}
    given |= {"container.image": container, "device": device, "gpu_memory": gpu_memory}
    chosen = load_site(site, {**given, "signal_lead": signal_lead})
    cluster.refuse_short_time(chosen)
    if not dry_run:
        cluster.refuse_missing_sbatch()
        cluster.refuse_too_many_cpus(chosen, gpus_per_node)
    asked = planned_run.RunRequest(
        recipe=recipe,
        overrides=with_early_stop(overrides, early_stop),
        strategy=strategy,
        name=name,
        runs_dir=runs_dir,
        fresh=fresh,
        allow=tuple(allow),
        source=source,
    )
    asked = import_foreign_checkpoint(cluster.choose(asked, chosen, nodes[0], gpus_per_node))
    others = [cluster.choose(asked, chosen, count, gpus_per_node) for count in nodes[1:]]
    submission = cluster.prepare([asked, *others], chosen, follow_ups, max_crashes, doctor)
    _show(submission, to_stderr=dry_run)
    if dry_run:
        echo(planned_run.describe_start(submission.planned, submission.request), to_stderr=True)
        for text in (submission.script, *submission.follow_ups.values()):
            emit(text)
        return
    _queue(submission, fresh)


def _queue(submission: Submission, fresh: bool) -> None:
    from launch.local import planned_run
    from launch.local.execute import reserve_name
    from launch.slurm import submit as cluster

    planned = submission.planned
    with reserve_name(planned, submission.request):
        cluster.refuse_if_queued(planned.run)
        if not fresh and planned_run.is_done(planned):
            echo(
                f"{planned.run.path}: done already, adapter in {planned.run.adapter}; --fresh trains it anew"
            )
            return
        with planned_run.moved_aside(planned.run, fresh) as old:
            if old:
                echo(f"the older run is now {old}")
            queued = cluster.queue(submission)
    emit(submission.script)
    for script, job in queued:
        echo(f"queued as job {job}: {planned.run.path / script}")
    echo(f"see: {command()} status {planned.run.name}; {command()} logs {planned.run.name} --follow")


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
    chosen = [find_run(run, runs_dir) for run in runs] if runs else runs_below(runs_dir)
    found = [status_of(run, show_job, now) for run in chosen]
    if as_json:
        emit(json.dumps([one.to_json() for one in found], indent=1))
        return
    if not found:
        echo(_NO_RUNS.format(runs_dir))
        return
    _show_table([row(one, now) for one in found])
    for note in (note for one in found for note in one.notes):
        echo(note)


@commands.command(epilog=example("samestep logs embedded --follow", "samestep logs embedded --rank 3"))
def logs(
    run: RunArgument,
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="R", parser=whole("--rank", 0), help="Only this rank's words, on whichever node it is."
        ),
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

    found = find_run(run, runs_dir)
    files = log_files(found, rank)
    may_begin = read_ledger(found).job or lock_holder(found.path)
    if not files and not (follow and may_begin):
        raise no_log(found, rank)
    try:
        if follow:
            _follow(found, rank)
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

    from launch.monitor.status_table import COLUMNS, columns_for, has_room, missed

    console, table = table_console(), Table()
    kept = columns_for(console.width, rows)
    may_fold = {"state"} if has_room(console.width, rows, kept) else {"run", "state"}
    for column in kept:
        table.add_column(COLUMNS[column], overflow="fold", no_wrap=COLUMNS[column] not in may_fold)
    for cells in rows:
        add_row(table, *(cells[column] for column in kept))
    console.print(table)
    if names := missed(rows, kept):
        console.print(f"no room here for: {', '.join(names)} (wider, or --json)", markup=False)


def _show(submission: Submission, to_stderr: bool) -> None:
    """The derived numbers, and what is allowed to differ."""
    from launch.run.changes import consequences

    console = table_console(to_stderr)
    for consequence in consequences(submission.planned.changed):
        console.print(printable(f"allowed: {consequence}"), markup=False)
    show_plan(submission.planned.plan, to_stderr)
    if counts := submission.node_counts[1:]:
        several = ", ".join(map(str, counts))
        console.print(f"or the same run on {several} nodes: whichever job starts first", markup=False)
    if other := submission.other_packages:
        console.print(
            f"versions and DeepSpeed: not judged here, the job runs with {printable(other)}; "
            "its first node judges them",
            markup=False,
        )
