"""Files and folders that are either whole or absent: written beside their place, brought to the disk, renamed.

Their modes are those that the umask and the folder around them give to any new file: a group that shares a folder
(umask 002, setgid, or a default ACL) can read, replace and lock what any of its members wrote.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.errors import ConfigError

LOCK_MODE = 0o666  # before the umask: who may write to a folder may lock what is in it


def atomic_write(file: Path, text: str) -> None:
    """Write a file that is either as it was or complete, after a power cut too.

    Raises:
        OSError: there is no writing it; `filename` is `file`.
    """
    draft = _beside(file)
    with naming(file):
        try:
            with draft.open("x", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            draft.replace(file)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; at the end it gets the name `folder`, and when the block fails it is removed.

    For small folders that several processes may be making at once: each has its own, and the first one that is done
    stays. A kill leaves only a folder with another name. `launch.checkpoints.publish` is for a folder that many ranks
    fill and a manifest seals, `trainer.export.output_folder` for gigabytes that a second attempt must not find twice;
    all three end in `sync_tree` and `rename_durably`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(folder)
    aside.mkdir()  # not mkdtemp: its 0700 would have to be mended, and chmod takes setgid away
    try:
        yield aside
        sync_tree(aside)
        try:
            rename_durably(aside, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_tree(folder: Path, flushed: Container[Path] = ()) -> None:
    """Flush a complete folder that has not got its name yet: after a power cut the name would stand for all of it.

    Its files get the mode that new files have here. `flushed`: files below it that are on the disk already.
    """
    follow_umask(folder)
    for path in (*folder.rglob("*"), folder):
        if path not in flushed and not path.is_symlink():
            sync(path)


def rename_durably(tmp_dir: Path, folder: Path) -> None:
    """Give a flushed folder its name, in one step that a power cut does not take back.

    Raises:
        OSError: something with content has that name.
    """
    tmp_dir.rename(folder)
    sync(folder.parent)


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` the mode that it would have if it were opened there now.

    safetensors 0.8 writes 0600 whatever the umask. A file is made to see the mode: asking for the umask would set it
    for all threads, and where a folder has a default ACL there is none.
    """
    probe = _beside(folder / "mode")
    with probe.open("x") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != mode:
            with suppress(OSError):  # a disk that changes no modes: no reason to lose what was saved
                path.chmod(mode)


def refuse_readonly(folder: Path, what: str) -> None:
    """ConfigError unless `what` could be written into a folder now; the disk is asked with a file that goes again.

    For work that takes long before it writes: a read-only disk, a full one or a quota is known before.
    """
    probe = _beside(folder / "probe")
    try:
        with naming(folder):
            try:
                with probe.open("xb") as file:
                    file.write(bytes(2**16))
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                with suppress(OSError):
                    probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{place_of(error, str(folder))}; {what} would be written there: make it writable, or work on a copy"
        ) from None


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """An OSError in the block names `file`: a write that finds no room says nothing of where."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(file), None
        raise


def place_of(error: OSError, otherwise: str) -> str:
    """`<file>: <what is wrong>` of an error with a file, and for want of room the disk: where it is, what is free.

    `otherwise`: in place of a file that the system did not name.
    """
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else otherwise
    what = f"{name}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or name == otherwise:
        return what
    parents = (Path(name).absolute(), *Path(name).absolute().parents)
    disk = next(folder for folder in parents if folder.is_mount())  # the root is one
    usage = shutil.disk_usage(disk)
    return f"{what} (disk at {disk}, {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MB free)"


def _beside(path: Path) -> Path:
    """A name of its own in the same folder: other processes, here and on other machines, may be writing too."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
