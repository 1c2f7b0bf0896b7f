"""Who uses features in memory: a lock for every process, which the system lets go of when the process dies.

The last user removes a folder; what a killed one left goes when the next run begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from trainer.vision_cache.place import feature_folders, root_of


def join_users(folder: Path) -> IO[bytes]:
    """Make the folder and lock its `users` for this process and those it forks, until all of them are gone."""
    while True:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.parent.is_symlink() or folder.parent.stat().st_uid != os.getuid():
            raise PermissionError(0, "its parent belongs to another user")
        try:
            folder.mkdir(exist_ok=True)
            users = (folder / "users").open("ab")
        except FileNotFoundError:  # the last user removes it just now
            continue
        fcntl.flock(users, fcntl.LOCK_SH)
        if _is_still(users, folder / "users"):
            return users
        users.close()


def remove_unused(mine: Path | None = None) -> None:
    """Remove features in memory whose users have all died, but for those in `mine`."""
    for folder in feature_folders(root := root_of("memory")):
        if folder == mine:
            continue
        with contextlib.suppress(OSError), (folder / "users").open("ab") as users:
            if try_lock(users, fcntl.LOCK_EX) and _is_still(users, folder / "users"):
                shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.rmdir()


def try_lock(file: IO[bytes], kind: int) -> bool:
    """Lock an open file (`fcntl.LOCK_SH`, `LOCK_EX`) without waiting; False: somebody holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_still(file: IO[bytes], path: Path) -> bool:
    """The open file is the one that the path names, not one that was removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
