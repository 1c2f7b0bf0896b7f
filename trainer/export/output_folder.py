"""A folder of gigabytes that is either whole or absent: written beside its place, locked meanwhile, renamed at the end.

Its last steps are those of every folder (`launch.atomic_files`). What differs is the name of the folder aside: it is
fixed, so the next attempt finds what a killed one left and replaces it, and a lock says whether anybody writes there.
Folders with random names (`atomic_dir`) would fill the disk with the rests of killed merges.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.atomic_files import rename_durably, sync_tree
from launch.errors import CheckpointError, ConfigError
from launch.run.lock import hold_lock, lock_holder
from trainer.formats.validated import unreadable_is_refused

_OURS = ".samestep-writes"  # a folder with it is ours to throw away


@unreadable_is_refused()
def refuse_place(output: Path, needed: int) -> None:
    """CheckpointError unless `needed` bytes can be written as the new folder `output`. Writes nothing."""
    _refuse_existing(output)
    parent = output.parent
    while not parent.is_dir():
        if parent.exists():
            raise CheckpointError(f"--output: {parent} is a file; choose another folder")
        parent = parent.parent
    free = shutil.disk_usage(parent).free + _size(_tmp_dir(output))
    if free < needed:
        raise CheckpointError(
            f"--output: {parent} has {free / 1e9:.2f} GB free where {needed / 1e9:.2f} GB are needed; "
            "free some space or choose another place"
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"--output: {parent} cannot be written to; choose another place")
    tmp_dir = _tmp_dir(output)
    is_empty = tmp_dir.is_dir() and not any(tmp_dir.iterdir())
    if tmp_dir.exists() and not is_empty and not (tmp_dir / _OURS).is_file():
        raise CheckpointError(f"{tmp_dir}: exists and is not the rest of our own writing; move it away")
    if holder := lock_holder(output.parent, _lock_name(output)):
        raise CheckpointError(_busy(output, holder))


@contextmanager
def atomic_output(output: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on disk and renamed to `output` at the end, removed when the block fails.

    A kill leaves `<output>.partial`, which the next call replaces. Call `refuse_place` first. Only who holds the lock
    beside it removes anything: another process may be writing there since.
    """
    tmp_dir = _tmp_dir(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            _refuse_existing(output)  # another process may have been done first
            with _removed_on_failure(tmp_dir):
                shutil.rmtree(tmp_dir, ignore_errors=True)
                tmp_dir.mkdir()
                (tmp_dir / _OURS).touch()
                yield tmp_dir
                sync_tree(tmp_dir)
                rename_durably(tmp_dir, output)
            (output / _OURS).unlink()
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error.strerror or error}); free or choose another place"
        ) from error


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"--output: {output} exists already; choose another folder or move it away")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(hold_lock(output.parent, _lock_name(output)))
        except ConfigError as error:  # in the words of a run
            holder = lock_holder(output.parent, _lock_name(output))
            place = f"{output.parent}: the file system knows no locks; choose another --output"
            raise CheckpointError(_busy(output, holder) if holder else place) from error
        yield


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _lock_name(output: Path) -> str:
    """Beside the folder that is written, and as every lock of ours it stays: `hold_lock` says why."""
    return f".{output.name}.partial.lock"


def _busy(output: Path, holder: str) -> str:
    return f"{_tmp_dir(output)}: {holder} writes there now; wait, or choose another --output"


def _tmp_dir(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _size(folder: Path) -> int:
    """Return the bytes of the rest of a killed attempt, which will make room."""
    if not (folder / _OURS).is_file():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
