"""The attempts that were started on this machine, as their logs tell them: where each began, ended, and why.

The ledger has the attempts of jobs alone. A log has what rank 0 printed (`trainer.attempt_log`), and its name is the
time of the start.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from launch.run.directory import RunDirectory
from launch.run.local_log import local_logs
from launch.untrusted_files import UNREADABLE, read_tail

_MOST = 2**22  # bytes of the end of a log
_WORLD_SIZE = re.compile(r"strategy (\w{1,20}), world size (\d{1,6}),")
_RESUMED = re.compile(r"resuming at step (\d{1,12}) of \d{1,12}$", re.MULTILINE)
_STEP = re.compile(r"^step (\d{1,12})/(\d{1,12}) ", re.MULTILINE)
_STOPPED = re.compile(
    r"stopped, (.{1,300}?): at step (\d{1,12}) of \d{1,12}; the same command goes on$", re.MULTILINE
)
_ERROR = re.compile(r"^error: (.{1,300})", re.MULTILINE)
_LAUNCHER = re.compile(r"the launcher (ended with exit status -?\d{1,4})")


@dataclass(frozen=True)
class LocalAttempt:
    """One start on this machine. Steps are those that the log has seen; `how` is None while it may be under way."""

    began: float
    processes: str
    first_step: int
    last_step: int
    how: str | None
    reason: str


def local_attempts(run: RunDirectory, is_running: bool) -> list[LocalAttempt]:
    """Read the logs of a run, the oldest first; one that cannot be read says so in its reason."""
    logs = local_logs(run)
    return [_attempt(file, is_running and file == logs[-1]) for file in logs]


def _attempt(file: Path, may_run: bool) -> LocalAttempt:
    try:
        text = read_tail(file, _MOST).decode(errors="replace")
    except UNREADABLE as error:
        return LocalAttempt(_began(file), "", 0, 0, "unknown", f"its log cannot be read ({error})")
    begin, steps = _RESUMED.search(text), _STEP.findall(text)
    first = int(begin[1]) if begin else 0
    last, most = (int(number) for number in steps[-1]) if steps else (first, 0)
    world = _WORLD_SIZE.search(text)
    how, reason, last = _end(text, last, most, may_run)
    return LocalAttempt(_began(file), f"{world[2]} x {world[1]}" if world else "", first, last, how, reason)


def _end(text: str, last: int, most: int, may_run: bool) -> tuple[str | None, str, int]:
    """(how it ended, why, its last step). The first error is the cause, what follows are its consequences."""
    if stopped := _STOPPED.search(text):
        return "stopped", stopped[1], int(stopped[2])
    if error := _ERROR.search(text):
        return "failed", error[1], last
    if ended := _LAUNCHER.search(text):
        return "failed", f"the launcher {ended[1]}", last
    if may_run:
        return None, "", last
    if most and last == most:
        return "done", f"step {last}", last
    return "died", f"left no word after step {last:,}", last


def _began(file: Path) -> float:
    """Seconds since 1970, of this machine's clock; 0 for a name that is no time."""
    try:
        return time.mktime(time.strptime(file.stem, "local-%Y%m%d-%H%M%S"))
    except (ValueError, OverflowError):
        return 0.0
