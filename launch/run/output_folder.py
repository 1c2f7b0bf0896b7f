"""Whether a folder of gigabytes can be written where it is wanted: judged before anything is loaded. Torch-free.

`trainer.export.output_folder` writes it, under the names that are kept here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from launch.atomic_files import place_of
from launch.errors import CheckpointError
from launch.run.lock import lock_holder

OURS = ".samestep-writes"  # a folder with it is ours to throw away


def refuse_place(output: Path, needed: int = 0) -> None:
    """CheckpointError unless `needed` bytes can be written as the new folder `output`. Writes nothing."""
    try:
        _refuse_place(output.expanduser().absolute(), needed)
    except OSError as error:
        raise CheckpointError(f"--output: {place_of(error, str(output))}; choose another place") from error


def _refuse_place(output: Path, needed: int) -> None:
    refuse_existing(output)
    parent = output.parent
    while not parent.is_dir():
        if parent.exists():
            raise CheckpointError(f"--output: {parent} is a file; choose another folder")
        parent = parent.parent
    free = shutil.disk_usage(parent).free + _size(tmp_dir_of(output))
    if free < needed:
        raise CheckpointError(
            f"--output: {parent} has {free / 1e9:.2f} GB free where {needed / 1e9:.2f} GB are needed; "
            "free some space or choose another place"
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"--output: {parent} cannot be written to; choose another place")
    tmp_dir = tmp_dir_of(output)
    is_empty = tmp_dir.is_dir() and not any(tmp_dir.iterdir())
    if tmp_dir.exists() and not is_empty and not (tmp_dir / OURS).is_file():
        raise CheckpointError(f"{tmp_dir}: exists and is not the rest of our own writing; move it away")
    if holder := lock_holder(output.parent, lock_name(output)):
        raise CheckpointError(is_busy(output, holder))


def refuse_existing(output: Path) -> None:
    """CheckpointError where there is something of that name already."""
    if output.exists() or output.is_symlink():
        raise CheckpointError(f"--output: {output} exists already; choose another folder or move it away")


def lock_name(output: Path) -> str:
    """Beside the folder that is written, and as every lock of ours it stays: `hold_lock` says why."""
    return f".{output.name}.partial.lock"


def is_busy(output: Path, holder: str) -> str:
    """Say who writes the folder now."""
    return f"{tmp_dir_of(output)}: {holder} writes there now; wait, or choose another --output"


def tmp_dir_of(output: Path) -> Path:
    """The folder aside in which `output` is written."""
    return output.with_name(output.name + ".partial")


def _size(folder: Path) -> int:
    """Return the bytes of the rest of a killed attempt, which will make room."""
    if not (folder / OURS).is_file():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
