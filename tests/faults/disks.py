"""A small disk for a run, and how it gets full."""

from __future__ import annotations

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
    """Leave so many bytes of the disk."""
    with (folder / "filler").open("wb") as filler:
        free = os.statvfs(folder)
        os.posix_fallocate(filler.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))
