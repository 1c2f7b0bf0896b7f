"""A folder that is either whole or absent: written beside its place, locked meanwhile, renamed at the end.

The name of the folder aside is fixed, so the next attempt finds what a killed one left, and throws it away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.errors import CheckpointError
from launch.run_directory import hold_lock, lock_holder

_OURS = ".samestep-writes"  # locked while we write; a folder with it is ours to throw away


def refuse_place(output: Path, needed: int) -> None:
    """CheckpointError unless `needed` bytes can be written as the new folder `output`. Writes nothing."""
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"--output: {output} exists already; choose another folder or move it away")
    parent = output.parent
    while not parent.is_dir():
        if parent.exists():
            raise CheckpointError(f"--output: {parent} is a file; choose another folder")
        parent = parent.parent
    free = shutil.disk_usage(parent).free + _size(_aside(output))
    if free < needed:
        raise CheckpointError(
            f"--output: {parent} has {free / 1e9:.2f} GB free where {needed / 1e9:.2f} GB are needed; "
            "free some space or choose another place"
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"--output: {parent} cannot be written to; choose another place")
    aside = _aside(output)
    if aside.exists() and any(aside.iterdir()) and not (aside / _OURS).is_file():
        raise CheckpointError(f"{aside}: exists and is not the rest of our own writing; move it away")
    if holder := lock_holder(aside, _OURS):
        raise CheckpointError(f"{aside}: {holder} writes there now; wait, or choose another --output")


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """An empty folder to fill; on disk and renamed to `output` at the end, removed when the block fails.

    A kill leaves `<output>.partial`, which the next call replaces. Call `refuse_place` first.
    """
    aside = _aside(output)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with hold_lock(aside, _OURS):
            yield aside
            for file in aside.rglob("*"):
                _sync(file)
            _sync(aside)
            aside.rename(output)
        (output / _OURS).unlink()
        _sync(output.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{output}: could not be written ({error.strerror or error}); free or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _aside(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _size(folder: Path) -> int:
    """Bytes of the rest of a killed attempt, which will make room."""
    if not (folder / _OURS).is_file():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
