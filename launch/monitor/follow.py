"""`samestep logs --follow`: what a run says from now on, from before its first word to its end."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from launch.untrusted_files import UNREADABLE, open_plain

POLL_S = 1.0
PIECE = 2**20  # bytes
LOOK_EVERY_POLLS = 5  # polls; Slurm's controller is not to be asked every second
BELIEVED = 3  # looks in a row at a run that has ended: between two attempts nobody has it for moments


def follow(
    files: Callable[[], list[Path]],
    end: Callable[[], str | None],
    write: Callable[[bytes], None],
    wait_for_first: Callable[[], None],
) -> str:
    """Write what `files` hold as they grow, those of later attempts too, until the run ends. Returns how it ended.

    `end`: how the run has ended, None while it waits or trains or may still say something. `wait_for_first`: called
    once when there is no file yet.
    """
    read: dict[Path, int] = {}
    ended, times = None, 0
    for poll in itertools.count():
        if ended is not None or poll % LOOK_EVERY_POLLS == 0:
            ended = end()
            times = 0 if ended is None else times + 1
        for file in files():  # after the look: nobody had more to say when `end` was no longer None
            read[file] = _copy_on(file, read.get(file, 0), write)
        if ended is not None and times == BELIEVED:
            return ended
        if poll == 0 and not read and ended is None:
            wait_for_first()
        time.sleep(POLL_S)
    raise AssertionError  # `count` has no end


def _copy_on(file: Path, begin: int, write: Callable[[bytes], None]) -> int:
    """Write what stands in a file from `begin` on, all of one that was cut or replaced. Returns where that ends."""
    while True:
        begin, piece = _read(file, begin)
        if not piece:
            return begin
        write(piece)  # outside of what survives an OSError: a closed pipe ends the command


def _read(file: Path, begin: int) -> tuple[int, bytes]:
    """A piece from `begin` on and where it ends; nothing where the disk does not answer (moved away, ESTALE of NFS)."""
    try:
        with open_plain(file) as handle:
            start = begin if os.fstat(handle.fileno()).st_size >= begin else 0
            handle.seek(start)
            piece = handle.read(PIECE)
            return start + len(piece), piece
    except UNREADABLE:
        return begin, b""
