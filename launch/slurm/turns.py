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
    """Another job gives the run back, or nobody says what it does."""


class StaleQueueError(RunError):
    """An attempt of another job is open, and may have begun after the queue was asked. `jobs`: whose states decide."""

    def __init__(self, attempt: str, jobs: Sequence[str]) -> None:
        super().__init__(f"attempt {attempt} may have begun after squeue was asked; ask it again")
        self.attempt, self.jobs = attempt, jobs


TAKEN = (UnderWayError, ChangingHandsError)
"""What a job that stands by waits for."""


def refuse_another_job(
    run: RunDirectory, allocation: Allocation, queue: Sequence[QueuedJob], seen: str | None, now: float
) -> None:
    """One job at a time: also between the start of an attempt and the minute when its trainer takes the lock.

    Minutes may lie between the question to squeue and this decision, and clocks of nodes differ: that another job is
    gone is believed of an attempt alone that was `seen` (JOB.RESTART) before the question. `seen` is None for a script
    of an older version, which cannot ask again: there the clocks at `now` decide.

    Raises:
        UnderWayError: another job of the run is running.
        ChangingHandsError: another one is ending, or squeue does not say what it does.
        StaleQueueError: squeue is to be asked again.
    """
    book = ledger.read_ledger(run)
    attempt = book.open
    if attempt is None or attempt.job == allocation.job:
        return
    states = {job.job: job.state for job in queue}
    state = states.get(attempt.job, "")
    if state in RUNNING:
        remedy = f"`scancel {attempt.job}` ends it"
        if allocation.is_sibling(attempt.job):
            remedy = "tasks of an array need runs of their own, for example OPTIONS=(--name mine-$SLURM_ARRAY_TASK_ID)"
        raise UnderWayError(
            f"{run.path}: job {attempt.job} of this run is under way ({state.lower()}) and goes on by itself; {remedy}"
        )
    if state in ENDING or (seen is None and attempt.began > now):
        raise ChangingHandsError(
            f"{run.path}: job {attempt.job} of this run is {state.lower() or 'just beginning'}"
        )
    which = f"{attempt.job}.{attempt.restart}"
    if seen is not None and seen != which:
        jobs = dict.fromkeys((attempt.job, allocation.job, *book.others_of(allocation.job)))
        raise StaleQueueError(which, [*jobs])
    if seen is not None and allocation.job not in states:
        raise ChangingHandsError(
            f"{run.path}: whether job {attempt.job} of this run goes on is unknown; squeue does not even name "
            f"job {allocation.job}, which asks"
        )


def refuse_after_a_stop(run: RunDirectory, allocation: Allocation) -> None:
    """RunError when a job of the same submission was stopped or its training refused: that was meant for all of them.

    And when this job's own last attempt was stopped by the user: it was taken away meanwhile, which queues it again.
    They were to be cancelled; a scancel may fail. Attempts that never began say nothing, save one that answered a stop:
    another job may have been turned away since. What the doctor refused was meant for the nodes of that job alone.
    """
    book = ledger.read_ledger(run)
    before = [
        one for one in book.attempts if (one.job, one.restart) == (allocation.job, allocation.restart - 1)
    ]
    if before and before[-1].how == "stopped" and before[-1].reason.startswith("user"):
        again = f"`sbatch` its script again to go on, with a job of its own ({before[-1].reason})"
        raise RunError(
            f"{run.path}: job {allocation.job} was stopped, and queued again by Slurm alone; {again}"
        )
    begun = [
        attempt
        for attempt in book.attempts
        if (attempt.how in (None, "stopped") or attempt.ended != attempt.began) and not attempt.is_unfit
    ]
    last = begun[-1] if begun else None  # in the order of the file: nodes have clocks of their own
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
