"""The log of an attempt in the run's folder: what the ranks of this machine print, without progress bars.

Every line reaches the file with one unbuffered write, so a kill loses none; the file is opened for appending, so the
ranks of one machine share it. What is printed before the run is taken is kept in memory and written then.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from launch.run.directory import RunDirectory
from launch.run.local_log import KEPT_LOGS, MAX_LOG_BYTES, local_logs

_EARLY_BYTES = 2**16
_CONTROL = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")
_BAR = re.compile(b"|".join(character.encode() for character in "━╸╺█▏▎▍▌▋▊▉"))


class AttemptLog:
    """Takes the bytes that the process prints; writes whole lines to a file once there is one."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._early = bytearray()
        self._room, self._is_full = MAX_LOG_BYTES, False

    def open(self, file: Path) -> None:
        """Append to `file` from now on, beginning with what was printed before. A disk that takes none gets none."""
        with suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            self._descriptor = os.open(
                file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
            )
            early, self._early = bytes(self._early), bytearray()
            self._write(early)

    def add_line(self, line: bytes) -> None:
        """Write one line, which ends with a newline; lines beyond the bound are left out, and that is said once."""
        if self._descriptor is None:
            if len(self._early) + len(line) <= _EARLY_BYTES:
                self._early += line
            return
        if self._is_full:
            return
        if len(line) > self._room:
            line, self._is_full = f"(no more than {MAX_LOG_BYTES // 2**20} MB are kept)\n".encode(), True
        self._write(line)

    def _write(self, content: bytes) -> None:
        self._room -= len(content)
        if self._descriptor is not None and content:
            with suppress(OSError):  # the run does not end for want of its log
                os.write(self._descriptor, content)


class LineFilter:
    """Cuts what a stream prints into lines for a log: without colours, and without the bars that overwrite a line."""

    def __init__(self, log: AttemptLog) -> None:
        self._log, self._line = log, b""

    def feed(self, data: bytes) -> None:
        """Take what was printed; the last line is kept back until it is whole."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            # What a carriage return has overwritten is not on the screen either.
            shown = _CONTROL.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
            if not _BAR.search(shown):
                self._log.add_line(shown + b"\n")
        self._line = self._line[self._line.rfind(b"\r") + 1 :][-(2**16) :]


LOG = AttemptLog()
"""Of this process."""


def log_name() -> str:
    """The name of a new attempt's log, by the clock."""
    return f"local-{time.strftime('%Y%m%d-%H%M%S')}.log"


def open_attempt_log(run: RunDirectory, name: str, is_main: bool) -> None:
    """Begin the attempt's log on a rank of the first machine; rank 0 removes the oldest logs.

    In a job of `samestep submit` there is none: Slurm and torchrun write logs of their own.
    """
    if "SAMESTEP_STOP_LEAD" in os.environ or int(os.environ.get("GROUP_RANK", "0")) > 0:
        return
    LOG.open(run.path / "logs" / name)
    if is_main:
        for old in local_logs(run)[:-KEPT_LOGS]:
            with suppress(OSError):
                old.unlink()
