"""Reads a base model's weights into the system's cache while the processes that will load them still import.

Loading maps the files and waits for the disk at every page that is not there; the seconds before, in which the disk
has nothing to do, are enough for most of them. Asking the system to do it (`posix_fadvise(WILLNEED)`) is not: Linux
6.18 reads 8 MB of a file of 1 GiB then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psutil

CHUNK = 16 * 2**20


@contextmanager
def reading_ahead(folder: Path | None) -> Iterator[None]:
    """Read the safetensors files of a folder beside the block, at most until it ends; None: nothing.

    What is in the cache is not read again. Nothing is read where the files would take more than half of the free
    memory: the last of them would push out the first.
    """
    ended = Event()
    if folder is None or not (files := _that_fit(folder)):
        yield
        return
    Thread(target=_read, args=(files, ended), name="read-ahead", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _that_fit(folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
        size = sum(file.stat().st_size for file in files)
    except OSError:
        return []
    return files if size <= psutil.virtual_memory().available // 2 else []


def _read(files: list[Path], ended: Event) -> None:
    """A file that cannot be read is reported by whoever loads it."""
    buffer = memoryview(bytearray(CHUNK))
    for file in files:
        with suppress(OSError), file.open("rb", buffering=0) as opened:
            for offset in range(0, os.fstat(opened.fileno()).st_size, CHUNK):
                if ended.is_set():
                    return
                if not _is_cached(opened.fileno(), offset):
                    os.preadv(opened.fileno(), [buffer], offset)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether the page at an offset is in the cache, by a read that must not wait for the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # not there, or a file system that cannot say
        return False
