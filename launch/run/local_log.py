"""The logs of attempts that were started on this machine: `logs/local-<time>.log` in the run's folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.run.directory import RunDirectory
from launch.untrusted_files import UNREADABLE, printable_lines

MAX_LOG_BYTES = 2**24  # of one attempt and process
KEPT_LOGS = 20


def local_logs(run: RunDirectory) -> list[Path]:
    """The logs of attempts on this machine, the oldest first: their names are times."""
    return sorted((run.path / "logs").glob("local-*.log"))


def add_to_log(run: RunDirectory, text: str, since: float) -> None:
    """Add a line of the launcher's to the log of an attempt that began after `since` (seconds since 1970), if any."""
    logs = local_logs(run)
    line = f"{time.strftime('%H:%M:%S')} {printable_lines(text)}\n".encode()
    try:
        if not logs or logs[-1].stat().st_mtime < since:
            return
        descriptor = os.open(logs[-1], os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
    except UNREADABLE:
        return
    try:
        os.write(descriptor, line)
    except OSError:
        pass
    finally:
        os.close(descriptor)
