"""Checkpoints that go: rotated out when newer ones are valid, replaced, or never published."""

import itertools
import os
import re
import shutil
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from launch.atomic_files import sync
from launch.checkpoints.scan import folders_of, inspect_checkpoint, named_like
from launch.errors import CheckpointError
from launch.untrusted_files import reason_of

_REMOVED = re.compile(r"checkpoint-[0-9]+\.removed-[0-9]+")


def rotate_checkpoints(
    run_dir: Path, keep: int, newest: int | None = None, protected: Container[int] = ()
) -> None:
    """Remove what is older than the `keep` newest valid checkpoints, once their content has been verified.

    `newest`: the step just published. What claims to be newer was passed over when the run was resumed, and must
    not push out what the run has written since.

    Damaged and unpublished ones are neither counted nor removed: they are evidence. What is older is not
    read, so damage that only its content would show is not noticed there. A crash leaves each checkpoint
    whole or under a name that is none. Raises ValueError for `keep` below 2: the newest may be damaged.
    """
    if keep < 2:
        raise ValueError(f"keep {keep}: two checkpoints always stay, the newest may be damaged")
    _finish_removals(run_dir)
    published = [
        (step, folder)
        for step, published, folder in folders_of(run_dir)
        if published and (newest is None or step <= newest) and step not in protected
    ]
    if len(published) <= keep:
        return
    still_to_keep, older = keep, []
    for step, folder in reversed(published):
        if still_to_keep:
            still_to_keep -= inspect_checkpoint(folder, step, published=True, verify=True).valid
        elif inspect_checkpoint(folder, step, published=True, verify=False).valid:
            older.append(folder)
    for folder in reversed(older):
        removed = rename_away(folder)
        sync(run_dir)  # or a power cut could bring back the name without some of the files
        remove(removed)


def clear_unpublished(run_dir: Path) -> list[Path]:
    """Remove what was being written when a run was killed. The caller holds the run's lock.

    Returns the folders that lay there. Raises CheckpointError when one cannot be removed.
    """
    _finish_removals(run_dir)
    unpublished = [folder for _, published, folder in folders_of(run_dir) if not published]
    for folder in unpublished:
        try:
            _remove(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: the rest of a killed save cannot be removed ({reason_of(error)}); "
                "remove it or give permission"
            ) from None
    return unpublished


def _finish_removals(run_dir: Path) -> None:
    """Remove what a crash, or a reader on NFS, left of checkpoints that were taken away."""
    for path, _ in named_like(run_dir, _REMOVED):
        remove(path)


def rename_away(folder: Path) -> Path:
    """Give a checkpoint a name that is none, in one step; returns it."""
    names = (folder.with_name(f"{folder.name}.removed-{number}") for number in itertools.count())
    return folder.rename(next(path for path in names if not os.path.lexists(path)))


def remove(path: Path) -> None:
    """Remove what no longer counts. A file that a reader holds open on NFS must not end the run over it."""
    with suppress(OSError):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
