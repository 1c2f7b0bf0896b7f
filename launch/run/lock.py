"""The lock of a run directory, which one process holds.

Our own because the locks of `filelock` (4) that the system lets go of when a process dies do not say who holds them;
those that do are files, which a kill leaves behind. A refused command names the process and its machine.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.atomic_files import LOCK_MODE, naming
from launch.errors import ConfigError, InUseError
from launch.run.directory import RunDirectory
from launch.untrusted_files import UntrustedFileError, open_at_once, printable

LOCK_FILE = ".lock"
_HOLDER = b"process "  # that a lock's content begins with

_LOCK_PATIENCE_S = 1.0  # longer than a look at the lock by `lock_holder` can last

_held_locks: set[int] = set()


@contextmanager
def hold_lock(folder: Path, file_name: str = LOCK_FILE, patience_s: float | None = None) -> Iterator[None]:
    """Hold the one lock of `folder` (rank 0 of the trainer, for its lifetime). InUseError: who holds it.

    The kernel lets go when the process dies, however it dies. The file stays: removing it would let two
    processes lock two different files of one name.

    Raises:
        InUseError: somebody else holds it, for `patience_s` seconds (default: 1).
        ConfigError: the file system knows no locks, or what lies there is no lock of ours.
    """
    path = folder / file_name
    descriptor = _open_lock(path, os.O_RDWR | os.O_CREAT)
    _held_locks.add(descriptor)
    try:
        deadline = time.monotonic() + (_LOCK_PATIENCE_S if patience_s is None else patience_s)
        while not _try_lock(descriptor, fcntl.LOCK_EX, path):
            if time.monotonic() > deadline:
                raise InUseError(_in_use(path, _holder_in(descriptor)))
            time.sleep(0.05)
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _HOLDER + f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _held_locks.discard(descriptor)
        os.close(descriptor)


def lock_holder(folder: Path, file_name: str = LOCK_FILE) -> str | None:
    """Name the process that holds the lock of `folder` now ("process 12 on host"); None when nobody does. ConfigError:
    see `hold_lock`.
    """
    path = folder / file_name
    try:
        descriptor = _open_lock(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if _try_lock(descriptor, fcntl.LOCK_SH, path):
            return None
        return _holder_in(descriptor) or "another process"
    finally:
        os.close(descriptor)


def _in_use(path: Path, holder: str) -> str:
    who = holder or "another process"
    return f"{path}: this run is under way ({who}); wait for it to end or choose another --name"


def _let_go_after_fork() -> None:
    """A forked data worker must not keep the lock of a trainer that was killed."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


def _open_lock(path: Path, flags: int) -> int:
    """In a folder where others may write, what lies there may be a link to a file that is dear to us, or a pipe."""
    try:
        descriptor = open_at_once(path, flags | os.O_NOFOLLOW, LOCK_MODE)
    except OSError as error:
        in_its_place = (
            error.errno != errno.ELOOP or path.is_symlink()
        )  # else a folder above it is a loop of links
        if in_its_place and error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from None
        raise
    status = os.fstat(descriptor)
    # A file with this one name is the lock, whatever a fault has left in it.
    if not stat.S_ISREG(status.st_mode) or (
        status.st_nlink > 1 and not _is_ours(os.pread(descriptor, 201, 0))
    ):
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _is_ours(content: bytes) -> bool:
    """What a lock's file may hold: its holder, nothing, or zeros after a power cut; a second name of another file
    holds something else."""
    return content.startswith(_HOLDER) or (len(content) <= 200 and not content.strip(b"\0"))


def _no_lock(path: Path) -> UntrustedFileError:
    return UntrustedFileError(path, "is no lock of samestep (a link, or something else, lies in its place)")


def _try_lock(descriptor: int, kind: int, path: Path) -> bool:
    """False while somebody else holds it. ConfigError where there are no locks (ENOLCK of NFS, EOPNOTSUPP)."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be locked ({error.strerror}); the file system knows no locks, "
            "choose a --runs-dir on another one (on Lustre: mounted with -o flock)"
        ) from error


def _holder_in(descriptor: int) -> str:
    return printable(os.pread(descriptor, 200, 0).decode(errors="replace").strip())


def refuse_if_running(run: RunDirectory) -> None:
    """InUseError while a trainer holds this run's lock."""
    if holder := lock_holder(run.path):
        raise InUseError(_in_use(run.path, holder))


os.register_at_fork(after_in_child=_let_go_after_fork)
