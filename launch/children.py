"""Child processes of the command line: started and waited for, whatever arrives meanwhile."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from launch.errors import SamestepError


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
    """Run a child to its end, whatever arrives meanwhile.

    Ctrl-C reaches the child by itself (same terminal): the parent only waits, and a third one kills. SIGTERM
    reaches the parent alone and is passed on.
    """
    process = subprocess.Popen(command, env=environment)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    interrupts = 0
    try:
        while True:
            try:
                return Ended(process.wait(), interrupts > 0)
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts >= 3:
                    process.kill()
    finally:
        signal.signal(signal.SIGTERM, before)


def call_module(module: str, arguments: Sequence[str]) -> None:
    """Run `python -m module` to its end. Raises ChildError with its exit status."""
    ended = wait_for([sys.executable, "-m", module, *arguments])
    if ended.interrupted:
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError(f"python -m {module}", ended.status)
