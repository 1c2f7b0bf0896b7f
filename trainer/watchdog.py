"""A thread with open eyes: it ends a process that nobody waits for any more, and one that does not answer a stop.

It begins before the imports that take seconds. Whatever the main thread waits for meanwhile, a rendezvous, a
collective, a lock, a micro-batch that is lost, this thread looks twice a second whether the parent is gone. Once a run
is taken, that is a request to stop in good order like any other; a process that was asked to stop and makes no progress
is ended the hard way, which costs what a `kill -9` costs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from launch.launcher_variables import PARENT, is_launched

LOOK_S = 0.5
PATIENCE_S = 20.0
"""Without progress after a request to stop; torchrun gives the other ranks 30 s more, which is less than a minute."""
OTHERS_PATIENCE_S = 90.0
"""The same for processes beside the first, before the run is taken: the first one leaves the marker and must not be
ended with them, and on another machine a shared disk may show a STOP file for a minute after it was removed (NFS)."""
SAVE_PATIENCE_S = 600.0
"""The same while a checkpoint is being written, which must not be cut off; and the most that slow steps teach."""
FROZEN_S = 5.0
"""Between two looks: the whole process was suspended (SIGSTOP), or C code held the interpreter's lock."""


def _is_not_saving() -> bool:
    return False


class Watchdog:
    """What the thread looks at. `parent`: the process id of whoever waits for this process; None: nobody does.

    `spares_children`: at a hard end they are left alone.
    """

    def __init__(self, parent: int | None) -> None:
        self.parent = parent
        self.spares_children = False
        self._alive_at = self._looked_at = self._woke_at = time.monotonic()
        self._patience = PATIENCE_S
        self._slowest = 0.0  # between two signs of progress since the first micro-batch
        self._computes = self._has_stepped = False
        self._answer: Callable[[bytes], str | None] | None = None
        self._is_saving: Callable[[], bool] = _is_not_saving
        self._orderly = False
        self._give_up: Callable[[str], None] = lambda _: None
        self._asked_at: float | None = None
        self._signals, self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def is_orphaned(self) -> bool:
        """Whoever waited for this process is gone."""
        return self.parent is not None and os.getppid() != self.parent

    def heartbeat(self) -> None:
        """Something was done: a micro-batch, a step, a phase of the start."""
        now = time.monotonic()
        if self._computes:
            self._slowest = max(self._slowest, now - self._alive_at)
        self._alive_at = now

    def micro_batch_begins(self) -> None:
        """Of a step: from the first one on, what is slow teaches patience."""
        self.heartbeat()
        self._computes = True

    def steps_begin(self) -> None:
        """Note that the first step is done: from here on a hard end costs steps."""
        self.heartbeat()
        self._computes = self._has_stepped = True

    def answer_stops(
        self,
        wanted: Callable[[bytes], str | None],
        give_up: Callable[[str], None],
        is_saving: Callable[[], bool] = _is_not_saving,
        orderly: bool = True,
        patience: float = PATIENCE_S,
    ) -> None:
        """From here on the main thread answers; `wanted` says why it should stop, None while nobody asks.

        It is given the numbers of the signals that `wakeup` (`signal.set_wakeup_fd`) has heard of since the last look.
        `give_up`: called before the hard end of a process that has taken no step yet, with that reason. Unless
        `orderly`, a process whose parent is gone still ends at once. `patience`: seconds, at least.
        """
        self._heard()
        self._is_saving, self._give_up, self._orderly = is_saving, give_up, orderly
        self._patience = patience
        self._computes, self._has_stepped, self._slowest, self._asked_at = False, False, 0.0, None
        self._answer = wanted

    def forget_stops(self) -> None:
        """Watch only the parent again: the run is over or released."""
        self._answer = None

    def look(self) -> None:
        """Once; does not return when the process has to end."""
        answer, now = self._answer, time.monotonic()
        if now - self._looked_at > FROZEN_S:
            self._woke_at = now  # nobody could make progress meanwhile
        self._looked_at = now
        if self.is_orphaned() and not (answer and self._orderly):
            self.end("its launcher is gone")
        reason = answer(self._heard()) if answer else None
        if reason is None:
            self._asked_at = None
            return
        self._asked_at = self._asked_at or now
        waited = now - max(self._asked_at, self._alive_at, self._woke_at)
        patience = max(self._patience, min(3 * self._slowest, SAVE_PATIENCE_S))
        if waited < patience or (waited < SAVE_PATIENCE_S and self._is_saving()):
            return
        if not self._has_stepped:
            self._give_up(reason)
        self.end(f"asked to stop ({reason}) and without progress for {waited:.0f} s")

    def _heard(self) -> bytes:
        try:
            return os.read(self._signals, 4096)
        except BlockingIOError:
            return b""

    def end(self, why: str) -> NoReturn:
        """End this process, and all that it started unless they are spared, in the middle of whatever they do."""
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        line = f"error: {rank}{why}; ended (process {os.getpid()}), the same command goes on\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # whatever locks the streams of Python are held
        if not self.spares_children:
            kill_descendants()
        os._exit(1)

    def watch(self) -> None:
        """For ever. What a look itself meets (a disk out of reach) is no reason to close the eyes."""
        pause = threading.Event()  # never set; `time.sleep` is what tests replace, for all threads
        while not pause.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:
                sys.stderr.write(f"watchdog: {type(error).__name__}: {error}\n")


def kill_descendants() -> None:
    """Data workers, compilers: what would go on for seconds or minutes without this process."""
    import psutil

    try:
        for child in psutil.Process().children(recursive=True):
            try:
                child.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
    except (psutil.Error, OSError):
        return


def parent_of_this_process(environment: Mapping[str, str]) -> int | None:
    """Who waits for this process: as it was told, or the launcher whose variables it was given; None: nobody.

    0, which is nobody's parent, for a launcher that was gone before this process could look.
    """
    if (named := environment.get(PARENT, "")).isdecimal():
        return int(named)
    if not is_launched(environment):
        return None  # started by a shell, which may end before a process under `nohup` does
    parent = os.getppid()
    return 0 if _is_adopted(parent) else parent


def _is_adopted(parent: int) -> bool:
    """Return whether the parent is init or its like: no Python program, as launchers are, and of another session."""
    try:
        if Path(f"/proc/{parent}/exe").samefile("/proc/self/exe"):
            return False
    except OSError:
        pass
    try:
        return os.getsid(parent) != os.getsid(0)
    except OSError:
        return True


def start(environment: Mapping[str, str]) -> Watchdog:
    """Begin to watch over this process."""
    watchdog = Watchdog(parent_of_this_process(environment))
    threading.Thread(target=watchdog.watch, name="watchdog", daemon=True).start()
    return watchdog
