"""The logs of a run's jobs: which there are, and how long to wait for their first words."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from pathlib import Path

from launch.errors import ConfigError
from launch.monitor.status import current_state, job_of
from launch.planning.plan import Plan
from launch.run.directory import RunDirectory
from launch.run.local_log import local_logs
from launch.run.lock import lock_holder
from launch.slurm import attempts as ledger
from launch.slurm.attempts import Ledger
from launch.slurm.output import ENDING, RUNNING, JobFacts
from launch.untrusted_files import UntrustedFileError, path_inside, printable


def log_files(run: RunDirectory, rank: int | None) -> list[Path]:
    """The files with the words of the newest attempt: of its job, or of one rank; none before it has begun.

    Raises ConfigError for a rank that the run does not have.
    """
    return _of_rank(run, rank) if rank is not None else _newest_log(run, ledger.read_ledger(run))


def no_log(run: RunDirectory, rank: int | None) -> ConfigError:
    """Why there is nothing to show."""
    of = "" if rank is None else f" of rank {rank}"
    if ledger.read_ledger(run).job is None:
        return ConfigError(
            f"{run.path / 'logs'}: no log{of}, and no job of a cluster has had this run; "
            + (
                "the ranks of this machine share one log, leave --rank out"
                if rank is not None
                else "start it first"
            )
        )
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
    state, because = current_state(run, book, job_of(book, show_job), now)
    what = f"job {book.job} to begin" if book.job else "its first line"
    return f"{run.name}: no log yet, waiting for {what}: {state} ({because})"


def end_of(run: RunDirectory, show_job: Callable[[str], JobFacts | None], now: float) -> str | None:
    """How a run has ended, in a line; None while it waits or trains, or whoever trained it may still speak."""
    if not run.plan_file.is_file():
        return f"{run.name}: its folder is gone ({run.path})"
    book = ledger.read_ledger(run)
    job = job_of(book, show_job)
    # After the marker come the last words: torchrun's, and those of `launch.slurm.job end`.
    if lock_holder(run.path) or (job is not None and job.state in (*RUNNING, *ENDING)):
        return None
    state, because = current_state(run, book, job, now)
    if state in ("queued", "running", "not started"):
        return None
    return f"{run.name}: {state} ({because})"


def _newest_log(run: RunDirectory, book: Ledger) -> list[Path]:
    """Of the newest attempt, in a job or on this machine."""
    local = [path_inside(run.path, path) for path in local_logs(run)[-1:]]
    written = {path: at for path in [*local, *_of_job(run, book)] if (at := _written_at(path)) is not None}
    return sorted(written, key=written.__getitem__)[-1:]


def _of_job(run: RunDirectory, book: Ledger) -> list[Path]:
    jobs = {Path(attempt.log): attempt.job for attempt in book.attempts if attempt.log}
    jobs |= {run.path / "logs" / f"{job}.out": job for job in book.submitted}
    written = {path: at for path in jobs if (at := _written_at(path)) is not None}
    newest = sorted(written, key=written.__getitem__)[-1:]
    for path in newest:
        _refuse_another_file(run, path, jobs[path])
    return newest


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
    if plan.parallelism.is_one_process:  # no torchrun: the attempt's log is the rank's
        return _newest_log(run, ledger.read_ledger(run))
    attempts = [
        path for path in (run.path / "logs").glob("*.*") if re.fullmatch(r"\d+(_\d+)?\.\d+", path.name)
    ]
    node, local = divmod(rank, max(1, plan.gpus_per_node))
    for attempt in sorted(attempts, key=lambda path: _numbers(path.name), reverse=True):
        if files := sorted(attempt.glob(f"node-{node}/*/attempt_*/{local}/std*.log")):
            return [path_inside(run.path, file) for file in files]
    return []


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


def _numbers(name: str) -> tuple[int, int, int]:
    """JOB, TASK of an array (-1: none), RESTART, as in the name of an attempt's folder of logs."""
    job, _, restart = name.rpartition(".")
    job, _, task = job.partition("_")
    return int(job), int(task or -1), int(restart)
