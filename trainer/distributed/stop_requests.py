"""Requests to a run from outside, agreed over the ranks: stop at the next step boundary, or save there.

Signals, the files STOP and SAVE in the run directory and the death of the launcher become flags, one number for each
kind of request. Every rank adds its own to the step's all-reduce, so all ranks read the same requests in the same step
and nobody is left waiting in a collective.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import get_args

from launch.errors import RunError, SamestepError
from launch.run.directory import (
    RunDirectory,
    StopReason,
    leave_stopped,
    reason_of_sigterm,
    requested_save,
    requested_stop,
)
from launch.run.lock import lock_holder
from trainer import WATCHDOG
from trainer.distributed.collectives import gather_objects, run_on_all_ranks, to_user_error
from trainer.watchdog import OTHERS_PATIENCE_S, PATIENCE_S

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REASONS: tuple[StopReason, ...] = get_args(StopReason)  # the first that anybody gives is the run's
FLAGS = (*REASONS, "save", "fail")
"""What each number of `StopRequests.flags` counts."""


@dataclass(frozen=True)
class AgreedRequests:
    """The requests that all ranks know of after they added up their flags."""

    stop: StopReason | None = None
    save: bool = False
    fail: bool = False

    @staticmethod
    def of(sums: Sequence[float]) -> AgreedRequests:
        """Read the requests from the sums over all ranks, in the order of `FLAGS`."""
        raised = {flag for flag, count in zip(FLAGS, sums, strict=True) if count > 0}
        stop = next((reason for reason in REASONS if reason in raised), None)
        return AgreedRequests(stop, "save" in raised, "fail" in raised)


class StopRequests:
    """The requests that one rank knows of. Rank 0 alone reads the files: a node may see an older state of the disk.

    `parent`: the launcher's process id, None for a process that nobody waits for. `begins_at`: where the attempt
    begins, for the marker, once that is known.
    """

    def __init__(self, run: RunDirectory, rank: int, parent: int | None) -> None:
        self._run, self._rank, self._parent = run, rank, parent
        self._signalled: StopReason | None = None
        self._interrupted = False
        self.failure: SamestepError | None = None
        self.begins_at = ""

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: the first of each kind is a request; a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
        self._signalled = self._signalled or reason_of_signal(number)

    def flags(self) -> list[float]:
        """Return one number for each of `FLAGS`: 1 where this rank knows of it."""
        WATCHDOG.heartbeat()
        known: set[str] = {*self._stops()}
        if self.failure:
            known.add("fail")
        if self._rank == 0 and requested_save(self._run):
            known.add("save")
        return [float(flag in known) for flag in FLAGS]

    def _stops(self) -> set[StopReason]:
        known: set[StopReason] = set()
        if self._signalled:
            known.add(self._signalled)
        if self._parent is not None and os.getppid() != self._parent:
            known.add("orphaned")
        if self._rank == 0 and (reason := requested_stop(self._run)):
            known.add(reason)
        return known

    def stop_reason(self, numbers: bytes) -> StopReason | None:
        """Return why this rank should stop, as the watchdog sees it. `numbers`: of the signals since the last look.

        Python calls a handler when the main thread is back from C, and a collective without the others never is.
        """
        for number in numbers:
            if number in STOP_SIGNALS:
                self._signalled = self._signalled or reason_of_signal(number)
        return next((reason for reason in REASONS if reason in self._stops()), None)

    def give_up(self, reason: str) -> None:
        """Before a hard end in front of the first step: nothing is lost, and the run has stopped as it was asked to."""
        if self._rank == 0 and self.begins_at:
            leave_stopped(self._run, reason, self.begins_at)

    def fail(self, error: Exception) -> None:
        """Note that this rank cannot go on; the next step's all-reduce tells all before the weights change."""
        self.failure = self.failure or to_user_error(error)

    def raise_failure(self) -> None:
        """Raise this rank's failure, after the last step: no other step would bring it to the other ranks."""
        if self.failure:
            raise self.failure

    def agreed_failure(self) -> SamestepError:
        """Return what all ranks raise once they know of a failure: that of the first failed rank. A collective."""
        try:
            run_on_all_ranks(self.raise_failure)
        except SamestepError as error:
            return error
        return RunError("a rank could not go on and did not say why; see the words above")

    def agree(self) -> AgreedRequests:
        """Agree where no step's all-reduce comes by, before the first step and in evaluations. A collective."""
        flags_by_rank = gather_objects(self.flags())
        return AgreedRequests.of([sum(flags) for flags in zip(*flags_by_rank, strict=True)])


def reason_of_signal(number: int) -> StopReason:
    """Return why a signal of `STOP_SIGNALS` stops the run: a scheduler, somebody's SIGTERM, or the user."""
    return reason_of_sigterm() if number == signal.SIGTERM else "user"


def warn_of_slow_save(seconds: float) -> str | None:
    """Return what to say when a save took more than half of the scheduler's warning time (a batch job sets it)."""
    lead = os.environ.get("SAMESTEP_STOP_LEAD", "")
    if not lead.isdigit() or seconds <= int(lead) / 2:
        return None
    return (
        f"a save took {seconds:.1f} s, more than half of the {lead} s of warning before the time limit; "
        "submit with a longer --signal-lead"
    )


@contextmanager
def handle_stop_requests(run: RunDirectory, rank: int, parent: int | None) -> Iterator[StopRequests]:
    """Make signals requests, which the watchdog sees too; afterwards they are handled as before.

    `parent`: the launcher's process id, read when this process began. A signal that is ignored (`nohup`) stays so.
    """
    requests = StopRequests(run, rank, parent)
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    unpublished_before = _unpublished(run)
    handlers_before = {number: signal.signal(number, requests.receive) for number in handled}
    wakeup_before = signal.set_wakeup_fd(WATCHDOG.wakeup, warn_on_full_buffer=False)
    WATCHDOG.answer_stops(
        requests.stop_reason, requests.give_up, lambda: bool(_unpublished(run) - unpublished_before)
    )
    try:
        yield requests
    finally:
        WATCHDOG.forget_stops()
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


def handle_early_stops(run: RunDirectory) -> None:
    """Let a stop end the start before the run is locked, where the start cannot answer (a rendezvous, say).

    For a process that somebody waits for, who has cleared away what was asked of earlier attempts.
    """

    is_first = os.environ.get("RANK", "0") == "0"

    def give_up(reason: str) -> None:
        if is_first and lock_holder(run.path) is None:
            leave_stopped(run, reason)

    patience = PATIENCE_S if is_first else OTHERS_PATIENCE_S
    WATCHDOG.answer_stops(lambda _: requested_stop(run), give_up, orderly=False, patience=patience)


def _unpublished(run: RunDirectory) -> set[tuple[int, int]]:
    """List the folders (inode, ctime) that any rank is writing now, or wrote when an attempt was killed."""
    folders = set()
    for pattern in ("checkpoint-*.partial", f".{run.adapter.name}.*"):
        for folder in run.path.glob(pattern):
            with suppress(OSError):
                status = folder.stat()
                folders.add((status.st_ino, status.st_ctime_ns))
    return folders
