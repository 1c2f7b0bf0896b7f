"""What `samestep status` and `samestep logs` show: read from the run directory, with Slurm's word where it speaks."""

from __future__ import annotations

import contextlib
import math
import re
import stat
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch import ledger
from launch.checkpoints import age
from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.ledger import Ledger
from launch.merged import merges_behind
from launch.plan import Plan
from launch.run_directory import Marker, RunDirectory, lock_holder, read_marker
from launch.runs import old_plan
from launch.slurm import ENDING, RUNNING, WAITING, JobFacts
from launch.survey import newest_valid
from launch.untrusted_files import (
    UNREADABLE,
    UntrustedFileError,
    parse_json,
    path_inside,
    printable,
    printable_lines,
    read_tail,
    reason_of,
)

State = Literal["queued", "running", "stalled", "stopped", "failed", "done", "not started", "unknown"]
"""`unknown`: its folder cannot be read, or holds what no run would have written."""

COLUMNS = ("run", "state", "step", "samples/s", "loss", "checkpoint", "expected end", "restarts")
_BY_USE = ("expected end", "loss", "checkpoint", "restarts", "samples/s")  # the last is left out first
_STATE_WIDTHS = (12, 40)  # the least that holds "running (job", and in which any reason can be read
_STATE_LINES = 4  # on which a short reason may fold before columns are left out for it
_LONGEST_REASON = 1000  # characters; a marker may hold every problem of a recipe
_BORDER = 3  # characters that a table puts beside every column
RECENT = 50  # steps that the speed is taken from
# No step for so long, and for so many times the usual one, is a run that hangs; an evaluation lies between two steps.
STALLED_AFTER_S, STALLED_STEPS = 900.0, 50
STARTING_S = (
    300.0  # from the start of an attempt until its trainer takes the lock: imports on a slow shared disk
)


@dataclass(frozen=True)
class Status:
    """One run. None where nothing is known; times in seconds since 1970, ages in seconds."""

    run: str
    state: State
    because: str
    job: str | None = None
    nodes: str = ""
    step: int = 0
    max_steps: int | None = None
    samples_per_second: float | None = None
    loss: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    expected_end: float | None = None
    preempted: int = 0
    timed_out: int = 0
    crashed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def requeued(self) -> int:
        """Attempts that needed another."""
        return self.preempted + self.timed_out + self.crashed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "requeued": self.requeued}


def runs_below(runs_dir: Path) -> list[RunDirectory]:
    """Every run, by name; also folders that are not for us to look into, which may be runs."""
    folder = runs_dir.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--runs-dir: no such folder ({folder}); name the folder that holds the runs")
    return [RunDirectory(path.absolute()) for path in sorted(folder.iterdir()) if _may_be_a_run(path)]


def _may_be_a_run(path: Path) -> bool:
    try:
        return (path / "plan.json").is_file()
    except OSError:
        return True


def status_of(run: RunDirectory, show_job: Callable[[str], JobFacts | None], now: float) -> Status:
    """Everything about one run. Reads its newest checkpoint whole.

    Raises nothing: whatever is wrong with one folder is said in its own row, and the others are shown.
    """
    try:
        return _status_of(run, show_job, now)
    except Exception as error:  # what a folder of somebody else may hold has no end
        return _unknown(run, error)


def _unknown(run: RunDirectory, error: Exception) -> Status:
    """What is left to say of a folder that cannot be read."""
    because = str(error) if isinstance(error, SamestepError) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        because = f"{error.filename or run.path}: cannot be read ({reason_of(error)})"
    return Status(run.name, "unknown", because)


def _status_of(run: RunDirectory, show_job: Callable[[str], JobFacts | None], now: float) -> Status:
    plan = old_plan(run)
    book = ledger.read_ledger(run)
    job = _job_of(book, show_job)
    steps, last_change = _last_steps(run.metrics_file)
    speed = _samples_per_second(steps)
    step = steps[-1]["step"] if steps else 0
    checkpoint, written = _newest_checkpoint(run)
    marker, (holder, no_locks) = read_marker(run), _holder_of(run)
    state, because = state_of(marker, book, job, holder, run.environment_file.exists(), now)
    if no_locks and marker is None and state == "failed":  # or somebody trains it
        state, because = "unknown", no_locks
    usual = statistics.median(line["seconds"] for line in steps) if steps else 0.0
    idle = now - max(last_change, _began(run, book, holder))
    if state == "running" and idle > max(STALLED_AFTER_S, STALLED_STEPS * usual):
        state, because = "stalled", f"no step for {age(idle)}"
    left = (plan.max_steps - step) if plan else 0
    running = state == "running" and plan is not None and speed
    restarts = book.restarts()
    return Status(
        run=run.name,
        state=state,
        because=because,
        job=book.job,
        nodes=book.open.nodes if book.open else "",
        step=step,
        max_steps=plan.max_steps if plan else None,
        samples_per_second=speed,
        loss=steps[-1]["loss"] if steps else None,
        checkpoint_step=checkpoint,
        checkpoint_age=None if written is None else max(0.0, now - written),
        expected_end=now + left * plan.global_batch_size / speed if running and plan and speed else None,
        preempted=restarts["preempted"],
        timed_out=restarts["time"],
        crashed=restarts["crashed"],
        notes=tuple(_notes(run)),
    )


def _holder_of(run: RunDirectory) -> tuple[str | None, str]:
    """(who holds the run's lock, why that cannot be asked): a file system without locks hides nothing else."""
    try:
        return lock_holder(run.path), ""
    except ConfigError as error:
        return None, str(error)


def _notes(run: RunDirectory) -> list[str]:
    try:
        return merges_behind(run)
    except OSError:
        return []


def state_of(
    marker: Marker | None, book: Ledger, job: JobFacts | None, holder: str | None, begun: bool, now: float
) -> tuple[State, str]:
    """(state, why), from the marker, the ledger, the job and the holder of the run's lock; `begun`: it ever trained."""
    if job is not None and job.state in WAITING:
        again = sum(book.restarts().values())
        return "queued", f"{'requeued ' + str(again) + ' times, ' if again else ''}{job.reason}"
    if holder and marker is None:
        return "running", holder
    if marker is not None and marker.kind == "DONE":
        return "done", marker.text
    if marker is not None and marker.kind == "REFUSED":
        return "failed", marker.text
    if job is not None and job.state in (*RUNNING, *ENDING):
        return "running", f"job {book.job} ({job.state.lower()})"
    if gave_up := _gave_up(book):
        return "failed", gave_up
    if marker is not None:
        return "stopped", marker.text
    if book.last is None and not book.job and begun:
        return "failed", "ended without a word (killed, or it crashed); the same command goes on"
    return _without_a_word(book, job, now)


def _gave_up(book: Ledger) -> str | None:
    """Why the last job's attempts ended for good, whatever marker the last one that trained has left."""
    last = book.last
    if last is None or last.job != book.job or last.how is None:
        return None
    if last.how == "refused":
        return f"job {last.job}: {last.reason}"
    reason = ledger.reason_to_give_up([attempt for attempt in book.attempts if attempt.job == last.job])
    return f"job {last.job}: {reason}" if reason else None


def _without_a_word(book: Ledger, job: JobFacts | None, now: float) -> tuple[State, str]:
    """The state of a run that has no marker, and that nobody trains."""
    begun = any(attempt.job == book.job for attempt in book.attempts)
    if book.job and not begun and job is not None:
        words = f"job {book.job} is {job.state} and never began; see its log, then submit again"
        return ("stopped" if job.state == "CANCELLED" else "failed"), words
    last = book.last
    if last is None:
        return ("queued", f"job {book.job}, by the ledger alone") if book.job else ("not started", "")
    if last.how is not None:
        return "failed", f"job {last.job}: {last.reason}"
    if job is not None:
        return "failed", f"its job {last.job} is {job.state}"
    if now - last.began < STARTING_S:
        return "running", f"job {last.job} began {age(now - last.began)} ago, by the ledger alone"
    return "failed", f"job {last.job} left no word, and nobody holds it"


def _began(run: RunDirectory, book: Ledger, holder: str | None) -> float:
    """When the attempt under way began, as the ledger or the trainer's first file says; infinity: not yet."""
    times = [book.open.began] if book.open else []
    if holder:
        with contextlib.suppress(OSError):
            times.append(run.environment_file.stat().st_mtime)
    return max(times, default=math.inf)


def _last_steps(file: Path) -> tuple[list[dict[str, Any]], float]:
    """The newest lines of the metrics, and when the last one came; a line that is being written is passed over."""
    try:
        lines = read_tail(file, RECENT * 1000).decode(errors="replace").splitlines()
        changed = file.stat().st_mtime
    except UNREADABLE:
        return [], 0.0
    steps = []
    for line in lines:
        try:
            values = parse_json(line)
        except ValueError:
            continue
        if isinstance(values, dict) and _is_step(values):
            steps.append(values)
    return steps[-RECENT:], changed if steps else 0.0


def _is_step(values: dict[str, Any]) -> bool:
    """A line as the trainer writes it; what diverged has a loss that is no number, but it has one."""
    if not isinstance(values.get("step"), int) or not isinstance(values.get("loss"), int | float):
        return False
    counted = (values.get("samples"), values.get("seconds"))
    return all(isinstance(one, int | float) and math.isfinite(one) and one >= 0 for one in counted)


def _samples_per_second(steps: Sequence[dict[str, Any]]) -> float | None:
    """Of the median step: the first one of an attempt, or one beside a save, says little."""
    seconds = [line["seconds"] for line in steps if line["seconds"] > 0]
    return steps[-1]["samples"] / statistics.median(seconds) if seconds else None


def _newest_checkpoint(run: RunDirectory) -> tuple[int | None, float | None]:
    try:
        checkpoint, _ = newest_valid(run.path)
        return (checkpoint.step, checkpoint.folder.stat().st_mtime) if checkpoint else (None, None)
    except (OSError, CheckpointError):
        return None, None


def row(status: Status, now: float) -> tuple[str, ...]:
    """A row of `COLUMNS`."""
    because = printable_lines(status.because)
    because = because if len(because) <= _LONGEST_REASON else f"{because[:_LONGEST_REASON]}..."
    why = f" ({because})" if because else ""
    checkpoint = "-"
    if status.checkpoint_step is not None and status.checkpoint_age is not None:
        checkpoint = f"step {status.checkpoint_step}, {age(status.checkpoint_age)} ago"
    return (
        printable(status.run),
        f"{status.state}{why}",
        f"{status.step:,} of {status.max_steps:,}" if status.max_steps is not None else f"{status.step:,}",
        "-" if status.samples_per_second is None else f"{status.samples_per_second:,.2f}",
        "-" if status.loss is None else f"{status.loss:.4g}",
        checkpoint,
        "-" if status.expected_end is None else f"in {age(status.expected_end - now)}",
        f"{status.preempted} preempted, {status.timed_out} time, {status.crashed} crashed"
        if status.requeued
        else "-",
    )


def columns_for(width: int, rows: Sequence[Sequence[str]]) -> list[int]:
    """The `COLUMNS` that a table of `width` characters has room for beside whole names and readable reasons.

    The most useful ones that fit; those that say nothing only where all others do. Where there is no room even for
    names and reasons, these fold.
    """
    kept = [COLUMNS.index(name) for name in ("run", "state", "step")]
    for column in sorted(map(COLUMNS.index, _BY_USE), key=lambda column: _says_nothing(column, rows)):
        if has_room(width, rows, (*kept, column)):
            kept.append(column)
    return sorted(kept)


def has_room(width: int, rows: Sequence[Sequence[str]], columns: Sequence[int]) -> bool:
    """A table of `width` characters shows these columns with whole names and readable reasons."""
    return sum(_needed(column, rows) + _BORDER for column in columns) + 1 <= width


def missed(rows: Sequence[Sequence[str]], kept: Sequence[int]) -> list[str]:
    """The names of those columns that are not `kept` and would say something."""
    return [
        name for column, name in enumerate(COLUMNS) if column not in kept and not _says_nothing(column, rows)
    ]


def _needed(column: int, rows: Sequence[Sequence[str]]) -> int:
    """Characters of a column; of the state, with its reason on `_STATE_LINES`."""
    natural = max(map(len, [COLUMNS[column], *(line for row in rows for line in row[column].splitlines())]))
    if COLUMNS[column] != "state":
        return natural
    least, most = _STATE_WIDTHS
    return min(natural, most, max(least, math.ceil(natural / _STATE_LINES)))


def _says_nothing(column: int, rows: Sequence[Sequence[str]]) -> bool:
    return all(row[column] == "-" for row in rows)


# logs -------------------------------------------------------------------------------------------


def log_files(run: RunDirectory, rank: int | None) -> list[Path]:
    """The files with the words of the newest attempt: of its job, or of one rank; none before it has begun.

    Raises ConfigError for a rank that the run does not have.
    """
    return _of_rank(run, rank) if rank is not None else _of_job(run, ledger.read_ledger(run))


def no_log(run: RunDirectory, rank: int | None) -> ConfigError:
    """Why there is nothing to show."""
    if ledger.read_ledger(run).job is None:
        return ConfigError(
            f"{run.path / 'logs'}: no log, for no job of a cluster has had this run; a run of this machine writes its "
            f"words where it was started, its figures into {run.metrics_file.name}"
        )
    of = "" if rank is None else f" of rank {rank}"
    return ConfigError(
        f"{run.path / 'logs'}: no log{of} yet; `samestep status {run.name}` says whether its job has started"
    )


def never_spoke(run: RunDirectory, rank: int | None) -> ConfigError:
    """Why there was nothing to follow, for a run whose end is told already."""
    if rank is None:
        return ConfigError(
            f"{run.path / 'logs'}: no log, the end came before the first word; `sacct` may know more"
        )
    return ConfigError(
        f"{run.path / 'logs'}: no log of rank {rank}, the end came before its first word; "
        f"`samestep logs {run.name}` shows its job's"
    )


def waits_for(run: RunDirectory, show_job: Callable[[str], JobFacts | None], now: float) -> str:
    """What a run without a log waits for, in a line."""
    book = ledger.read_ledger(run)
    state, because = _state(run, book, _job_of(book, show_job), now)
    return f"{run.name}: no log yet, waiting for job {book.job} to begin: {state} ({because})"


def end_of(run: RunDirectory, show_job: Callable[[str], JobFacts | None], now: float) -> str | None:
    """How a run has ended, in a line; None while it waits or trains, or whoever trained it may still speak."""
    if not run.plan_file.is_file():
        return f"{run.name}: its folder is gone ({run.path})"
    book = ledger.read_ledger(run)
    job = _job_of(book, show_job)
    # After the marker come the last words: torchrun's, and those of `launch.allocation end`.
    if lock_holder(run.path) or (job is not None and job.state in (*RUNNING, *ENDING)):
        return None
    state, because = _state(run, book, job, now)
    if state in ("queued", "running", "not started"):
        return None
    return f"{run.name}: {state} ({because})"


def _job_of(book: Ledger, show_job: Callable[[str], JobFacts | None]) -> JobFacts | None:
    return show_job(book.job) if book.job else None


def _state(run: RunDirectory, book: Ledger, job: JobFacts | None, now: float) -> tuple[State, str]:
    """As `state_of`, from the run's folder."""
    holder, begun = lock_holder(run.path), run.environment_file.exists()
    return state_of(read_marker(run), book, job, holder, begun, now)


def _of_job(run: RunDirectory, book: Ledger) -> list[Path]:
    jobs = {Path(attempt.log): attempt.job for attempt in book.attempts if attempt.log}
    jobs |= {run.path / "logs" / f"{job}.out": job for job in book.submitted}
    written = {path: at for path in jobs if (at := _written_at(path)) is not None}
    newest = sorted(written, key=written.__getitem__)[-1:]
    for path in newest:
        _refuse_another_file(run, path, jobs[path])
    return newest


def _refuse_another_file(run: RunDirectory, path: Path, job: str) -> None:
    """UntrustedFileError for a log that is none: the ledger of a run that came from elsewhere may name any file.

    A job's log lies in the run's folder, or has the job's number in its name (sbatch's own slurm-%j.out).
    """
    try:
        path_inside(run.path, path)
    except UntrustedFileError:
        if not re.search(rf"(?<![0-9]){re.escape(job)}(?![0-9])", path.resolve().name):
            raise UntrustedFileError(
                ledger.ledger_file(run), f"names a log that is none of job {job}'s ({printable(str(path))})"
            ) from None


def _written_at(path: Path) -> float | None:
    """When a file changed, in seconds since 1970; None where there is none, or the shared disk does not answer."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file system has
        return None
    return facts.st_mtime if stat.S_ISREG(facts.st_mode) else None


def _of_rank(run: RunDirectory, rank: int) -> list[Path]:
    """torchrun writes logs/<job>.<restart>/node-<n>/<id>/attempt_0/<local rank>/{stdout,stderr}.log (torch 2.14)."""
    try:
        plan = Plan.read(run.plan_file)
    except FileNotFoundError:  # the run was moved away while its log is followed
        return []
    if not 0 <= rank < plan.world_size:
        raise ConfigError(
            f"--rank: {rank} is none of this run's ({plan.world_size} ranks); give 0 to {plan.world_size - 1}"
        )
    if plan.strategy == "single":  # no torchrun: the job's log is the rank's
        return _of_job(run, ledger.read_ledger(run))
    attempts = [path for path in (run.path / "logs").glob("*.*") if re.fullmatch(r"\d+\.\d+", path.name)]
    node, local = divmod(rank, max(1, plan.gpus_per_node))
    for attempt in sorted(attempts, key=lambda path: tuple(map(int, path.name.split("."))), reverse=True):
        if files := sorted(attempt.glob(f"node-{node}/*/attempt_*/{local}/std*.log")):
            return [path_inside(run.path, file) for file in files]
    return []
