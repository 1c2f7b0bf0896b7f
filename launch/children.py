"""Child processes of the command line: started and waited for, whatever arrives meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from launch.errors import SamestepError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ChildError(SamestepError):
    """A child process that has already said what is wrong; carries its exit status."""

    def __init__(self, what: str, status: int) -> None:
        self.exit_status = status if status in (1, 2) else 1
        super().__init__(f"{what}: did not finish (exit status {status}); see its words above")


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    status: int
    interrupted: bool


def wait_for(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Ended:
    """Run a child in a process group of its own to its end; every request to stop is passed on to the group.

    So each signal arrives once, whether a terminal sent it to all or somebody to this process alone, and no
    worker outlives a launcher that dies of it (accelerate 1.15 with one process). The third Ctrl-C kills.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            _send(process, signal.SIGKILL if received.count(signal.SIGINT) >= 3 else number)

    before = {number: signal.signal(number, pass_on) for number in _STOP_SIGNALS}
    try:
        process = subprocess.Popen(command, env=environment, process_group=0)
        if received:  # before there was a child
            _send(process, received[-1])
        return Ended(process.wait(), signal.SIGINT in received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def call_module(module: str, arguments: Sequence[str]) -> None:
    """Run `python -m module` to its end. Raises ChildError with its exit status."""
    ended = wait_for([sys.executable, "-m", module, *arguments])
    if ended.interrupted:
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError(f"python -m {module}", ended.status)
