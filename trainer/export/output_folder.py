"""A folder of gigabytes that is either whole or absent: written beside its place, locked meanwhile, renamed at the end.

Its last steps are those of every folder (`launch.atomic_files`). What differs is the name of the folder aside: it is
fixed, so the next attempt finds what a killed one left and replaces it, and a lock says whether anybody writes there.
Folders with random names (`atomic_dir`) would fill the disk with the rests of killed merges.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.atomic_files import rename_durably, sync_tree
from launch.errors import CheckpointError, ConfigError
from launch.run.lock import hold_lock, lock_holder
from launch.run.output_folder import OURS, is_busy, lock_name, refuse_existing, tmp_dir_of


@contextmanager
def atomic_output(output: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on disk and renamed to `output` at the end, removed when the block fails.

    A kill leaves `<output>.partial`, which the next call replaces. Call `refuse_place` first. Only who holds the lock
    beside it removes anything: another process may be writing there since.
    """
    tmp_dir = tmp_dir_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            refuse_existing(output)  # another process may have been done first
            with _removed_on_failure(tmp_dir):
                shutil.rmtree(tmp_dir, ignore_errors=True)
                tmp_dir.mkdir()
                (tmp_dir / OURS).touch()
                yield tmp_dir
                sync_tree(tmp_dir)
                rename_durably(tmp_dir, output)
            (output / OURS).unlink()
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written ({error.strerror or error}); free or choose another place"
        ) from error


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(hold_lock(output.parent, lock_name(output)))
        except ConfigError as error:  # in the words of a run
            holder = lock_holder(output.parent, lock_name(output))
            place = f"{output.parent}: the file system knows no locks; choose another --output"
            raise CheckpointError(is_busy(output, holder) if holder else place) from error
        yield


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
