"""One job at a time has a run: who comes second waits or leaves. Whoever starts first of one submission takes it."""

from __future__ import annotations

from collections.abc import Sequence

from launch.errors import InUseError, RunError
from launch.run.directory import RunDirectory
from launch.slurm import attempts as ledger
from launch.slurm.job_plan import Allocation
from launch.slurm.output import ENDING, RUNNING, WAITING, QueuedJob


class UnderWayError(RunError):
    """Another job has the run, and brings it to its end."""


class ChangingHandsError(InUseError):
    """Another job gives the run back, or begins just now."""


TAKEN = (UnderWayError, ChangingHandsError)
"""What a job that stands by waits for."""


def refuse_another_job(
    run: RunDirectory, allocation: Allocation, queue: Sequence[QueuedJob], now: float
) -> None:
    """One job at a time: also between the start of an attempt and the minute when its trainer takes the lock.

    Raises:
        UnderWayError: another job of the run is running, or has just begun as a task of the same array.
        ChangingHandsError: another one is ending, or began while `queue` was asked for.
    """
    attempt = ledger.read_ledger(run).open
    if attempt is None or attempt.job == allocation.job:
        return
    state = {job.job: job.state for job in queue}.get(attempt.job, "")
    sibling = allocation.is_sibling(attempt.job)
    if state in RUNNING or (sibling and attempt.began > now):
        remedy = f"`scancel {attempt.job}` ends it"
        if sibling:
            remedy = "tasks of an array need runs of their own, for example OPTIONS=(--name mine-$SLURM_ARRAY_TASK_ID)"
        raise UnderWayError(
            f"{run.path}: job {attempt.job} of this run is under way ({state.lower() or 'it has just begun'}) and goes "
            f"on by itself; {remedy}"
        )
    if state in ENDING or attempt.began > now:
        raise ChangingHandsError(
            f"{run.path}: job {attempt.job} of this run is {state.lower() or 'just beginning'}"
        )


def refuse_after_a_stop(run: RunDirectory, allocation: Allocation) -> None:
    """RunError when a job of the same submission was stopped or its training refused: that was meant for all of them.

    They were to be cancelled; a scancel may fail. Attempts that never began say nothing, save one that answered a stop:
    another job may have been turned away since. What the doctor refused was meant for the nodes of that job alone.
    """
    book = ledger.read_ledger(run)
    begun = [
        attempt
        for attempt in book.attempts
        if (attempt.how in (None, "stopped") or attempt.ended > attempt.began) and not attempt.is_unfit
    ]
    last = max(begun, key=lambda attempt: max(attempt.began, attempt.ended), default=None)
    if last is None or last.job not in book.others_of(allocation.job):
        return
    if last.how in ("stopped", "refused"):
        raise RunError(f"{run.path}: job {last.job} of the same submission was {last.how} ({last.reason})")


def waiting_others(run: RunDirectory, allocation: Allocation, queue: Sequence[QueuedJob]) -> list[str]:
    """The jobs of the same submission that wait for nodes, or will when they have given theirs back."""
    states = {job.job: job.state for job in queue}
    return [
        job
        for job in ledger.read_ledger(run).others_of(allocation.job)
        if states.get(job) in (*WAITING, *ENDING)
    ]
