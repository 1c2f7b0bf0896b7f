"""What `samestep status` and `samestep logs` show: read from the run directory, with Slurm's word where it speaks."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch.checkpoints.scan import newest_valid
from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.monitor.outlook import outlook_of
from launch.run.directory import Marker, RunDirectory, read_marker
from launch.run.lock import lock_holder
from launch.run.merged_model import merges_behind
from launch.run.request_files import old_plan
from launch.slurm import attempts as ledger
from launch.slurm.attempts import Ledger
from launch.slurm.output import ENDING, RUNNING, WAITING, JobFacts
from launch.units import age
from launch.untrusted_files import (
    UNREADABLE,
    parse_json,
    read_tail,
    reason_of,
)

State = Literal["queued", "running", "stalled", "stopped", "failed", "done", "not started", "unknown"]
"""`unknown`: its folder cannot be read, or holds what no run would have written."""

RECENT = 50  # steps that the speed is taken from
# No step for so long, and for so many times the usual one, is a run that hangs; an evaluation lies between two steps.
STALLED_AFTER_S, STALLED_STEPS = 900.0, 50
STARTING_S = (
    300.0  # from the start of an attempt until its trainer takes the lock: imports on a slow shared disk
)


@dataclass(frozen=True)
class Status:
    """One run. None where nothing is known; times in seconds since 1970, ages in seconds.

    `forecast_hours`: of all steps, as `samestep plan` expected them; `projected_hours`: at the speed of the last ones.
    """

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
    node_fail: int = 0
    forecast_hours: float | None = None
    projected_hours: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def requeued(self) -> int:
        """Attempts that needed another."""
        return self.preempted + self.timed_out + self.crashed + self.node_fail

    def to_json(self) -> dict[str, Any]:
        """Return all fields by their names, as `samestep status --json` prints them."""
        return {**asdict(self), "requeued": self.requeued}


def runs_below(runs_dir: Path) -> list[RunDirectory]:
    """Every run, by name; also folders that are not for us to look into, which may be runs."""
    folder = runs_dir.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--runs-dir: no such folder ({folder}); name the folder that holds the runs")
    return [RunDirectory(path.absolute()) for path in sorted(folder.iterdir()) if _may_be_a_run(path)]


def _may_be_a_run(path: Path) -> bool:
    try:
        return (path / "plan.json").is_file() or (path / "metrics.jsonl").is_file()
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
    job = job_of(book, show_job)
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
    outlook = outlook_of(run, plan, steps) if running and plan else None
    left_s = left * plan.global_batch_size / speed if running and plan and speed else None
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
        expected_end=None if left_s is None else now + (outlook.seconds_left if outlook else left_s),
        preempted=restarts["preempted"],
        timed_out=restarts["time"],
        crashed=restarts["crashed"],
        node_fail=restarts["node_fail"],
        forecast_hours=outlook.forecast_hours if outlook else None,
        projected_hours=outlook.projected_hours if outlook else None,
        notes=(*_notes(run), *([line] if outlook and (line := outlook.line(run.name)) else [])),
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
    attempts = [attempt for attempt in book.attempts if attempt.job == last.job]
    reason = ledger.reason_to_give_up(attempts, last.max_crashes)
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


# logs -------------------------------------------------------------------------------------------


def job_of(book: Ledger, show_job: Callable[[str], JobFacts | None]) -> JobFacts | None:
    """Return what Slurm knows of the newest job; None where there is no job or no word of it."""
    return show_job(book.job) if book.job else None


def current_state(run: RunDirectory, book: Ledger, job: JobFacts | None, now: float) -> tuple[State, str]:
    """Return the state as `state_of`, from the run's folder."""
    holder, begun = lock_holder(run.path), run.environment_file.exists()
    return state_of(read_marker(run), book, job, holder, begun, now)
