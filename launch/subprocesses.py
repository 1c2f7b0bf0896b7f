"""Child processes of the command line: started and waited for, whatever arrives meanwhile."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import psutil

from launch.console import log_stderr, write_to_nowhere
from launch.errors import SamestepError
from launch.launcher_variables import PARENT, remove_launcher_variables

STARTED = "SAMESTEP_STARTED"
"""In the environment of a launcher: when it was started, in seconds since 1970."""

PYTHON_VARIABLES = {"PYTHONSAFEPATH": "1", "PYTHONOPTIMIZE": "0"}
"""In the environment of `python -m`: else a `trainer` or a `datasets.py` in the current folder would be imported, and
transformers 5.23 fails without the docstrings that PYTHONOPTIMIZE=2 leaves out."""

_told: set[str] = set()
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ChildError(SamestepError):
    """A child process that did not finish; carries its exit status.

    `was_explained`: the child ended by itself and has said on the terminal what is wrong; a signal says nothing.
    """

    def __init__(self, what: str, status: int) -> None:
        self.was_explained = status in (1, 2)
        self.exit_status = status if self.was_explained else 1
        super().__init__(f"{what}: {_ended_by(status)}")


def _ended_by(status: int) -> str:
    if status >= 0:
        return f"did not finish (exit status {status}); see its words above"
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-status, f"signal {-status}")  # most real-time signals have no name
    memory = ", most likely for want of memory" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{memory}; the same command begins again"


@dataclass(frozen=True)
class Ended:
    """How a child ended. `interrupted`: after a Ctrl-C; `killed`: after the Ctrl-C that ends at once."""

    status: int
    interrupted: bool = False
    killed: bool = False


def wait_for(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    ask_to_stop: Callable[[int], None] | None = None,
) -> Ended:
    """Run a child in a process group of its own to its end; every request to stop is passed on.

    With `ask_to_stop` it goes there and the second Ctrl-C kills the child with all its descendants; else it goes to
    the group and the third Ctrl-C kills. So each arrives once, whether a terminal sent it to all or somebody to this
    process alone. A terminal that closes takes nothing down: what is still said goes nowhere.
    The child is told who waits for it, and gets no variables of another job's launcher.
    """
    last = 3 if ask_to_stop is None else 2
    interrupts = 0
    early: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def receive(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if number == signal.SIGHUP:
            _leave_terminal()
        if process is None:
            early.append(number)
        else:
            pass_on(process, number)

    def pass_on(child: subprocess.Popen[bytes], number: int) -> None:
        if interrupts >= last:
            _kill_all(child)
        elif ask_to_stop is None:
            _send(child, number)
        else:
            try:
                ask_to_stop(number)
            except OSError:  # the place to ask is gone
                _send(child, number)

    # A hang-up that is ignored (`nohup`) stays so.
    heeded = [
        number
        for number in _STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, receive) for number in heeded}
    try:
        # Nothing that is started asks anything: a library that would is answered by the end of the file.
        process = subprocess.Popen(
            command, env=_for_child(environment), process_group=0, stdin=subprocess.DEVNULL
        )
        for number in early:
            pass_on(process, number)
        status = process.wait()
        return Ended(status, interrupts > 0, interrupts >= last)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _for_child(environment: Mapping[str, str] | None) -> dict[str, str]:
    """What is taken out is said, once."""
    variables = dict(os.environ if environment is None else environment)
    if (notice := remove_launcher_variables(variables)) and notice not in _told:
        _told.add(notice)
        log_stderr(notice)
    return {**variables, PARENT: str(os.getpid())}


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """torchrun starts its workers in sessions of their own: a signal to the group does not reach them.

    Each is frozen before its children are counted, so that none is born meanwhile.
    """
    family: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        root.suspend()
        while born := {*root.children(recursive=True)} - family:
            family |= born
            for member in born:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.suspend()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _send(process, signal.SIGKILL)


def _leave_terminal() -> None:
    """Writing to a terminal that is gone is an error (EIO), and the run is not over."""
    for descriptor in (0, 1, 2):
        # One that hung up says no longer that it is a terminal, only that it is a character device.
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                write_to_nowhere(descriptor)


def processes_with(words: Sequence[str]) -> list[psutil.Process]:
    """The live processes of this machine that were started with all these arguments, whoever their parent is."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {*words} <= {*(process.info["cmdline"] or ())}
    ]


def become_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """Go on as `python -m module`, with this terminal and its keyboard. Never returns."""
    environment = {**os.environ, **PYTHON_VARIABLES}
    if notice := remove_launcher_variables(environment):
        log_stderr(notice)
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def call_module(module: str, arguments: Sequence[str]) -> None:
    """Run `python -m module` to its end. Raises ChildError with its exit status."""
    ended = wait_for([sys.executable, "-m", module, *arguments], {**os.environ, **PYTHON_VARIABLES})
    if ended.interrupted:
        log_stderr("interrupted; give the same command again")
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError(f"python -m {module}", ended.status)
