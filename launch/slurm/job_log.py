"""The log of a job: standard error of its script, as standard output belongs to the script."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launch.untrusted_files import printable_lines


def log_file() -> str:
    """Where this job's words go, when that is a file: as Slurm opened it for the script."""
    try:
        path = Path("/proc/self/fd/2").resolve()
        return str(path) if path.is_file() else ""
    except OSError:
        return ""


def say(text: str) -> None:
    """Write a line with the time."""
    print(f"{time.strftime('%F %T')} {printable_lines(text)}", file=sys.stderr, flush=True)
