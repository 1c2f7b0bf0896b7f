"""A small disk for a run, and how it gets full."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_BYTES = 160 * 2**20  # `samestep run` asks for 100 MiB


@contextmanager
def plain_folder(path: Path) -> Iterator[None]:
    """A folder of the disk that is there."""
    path.mkdir()
    yield


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A small disk of its own."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes of the disk, or fewer where the run writes meanwhile."""
    with (folder / "filler").open("wb") as filler:
        for _ in range(50):
            free = os.statvfs(folder)
            room = free.f_bavail * free.f_frsize
            if room <= left:  # the run itself has filled it
                return
            try:
                os.posix_fallocate(filler.fileno(), 0, room - left)
            except OSError as error:
                if error.errno != errno.ENOSPC:  # what was free is taken already
                    raise
                filler.truncate(0)
            else:
                return
    raise RuntimeError(f"{folder}: cannot be filled; it changes faster than it can be measured")
