"""Folders that are either whole or absent: written aside, then renamed; and their names on the disk."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A folder aside to write into; renamed to `folder` at the end, removed when the block fails.

    A kill leaves only a folder with another name. If `folder` appears meanwhile, the first one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
        hidden = os.umask(0)
        os.umask(hidden)
        for path in (aside, *aside.rglob("*")):  # mkdtemp gives 0700 and safetensors 0600, whatever the umask
            path.chmod((0o777 if path.is_dir() else 0o666) & ~hidden)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
