"""Where features are kept: a folder for each tower and setting, bounded in bytes, shared by the processes of a node.

    ROOT/KEY/about.json     what made them (`trainer.vision_cache.cache_key`)
    ROOT/KEY/used           bytes of the folder's files, 8 bytes; whoever writes holds its lock
    ROOT/KEY/users          locked by every process that uses features in memory, for as long as it lives
    ROOT/KEY/ab/ab12...     one image's features (`trainer.vision_cache.file`)

`disk`: ROOT is `vision` in SAMESTEP_CACHE. `memory`: a folder in /dev/shm, of which the last user removes what it used;
what a killed one left goes when the next run begins, whatever that keeps, because the system has let go of its lock.
Both: SAMESTEP_VISION_CACHE names another folder, SAMESTEP_VISION_CACHE_GB another bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from launch.atomic_files import LOCK_MODE, atomic_write
from launch.errors import ConfigError
from launch.units import decimal_size
from launch.untrusted_files import UNREADABLE, read_bytes, read_json
from trainer.vision_cache.cache_key import describe_difference
from trainer.vision_cache.file import Features, FlawError, Kind, encode, read
from trainer.vision_cache.place import Place, bound_of, feature_folders, root_of
from trainer.vision_cache.users import join_users, remove_unused, try_lock

SPARED = 0.05
"""The share of a disk that is never filled."""
ABANDONED_SECONDS = 600
"""A file that is still written aside after this belongs to a process that died."""

logger = logging.getLogger("trainer")
_count = itertools.count()


class FullError(Exception):
    """Why nothing more can be kept."""


def image_name(image: bytes) -> str:
    """The name of an image's features: the sha256 of its encoded bytes, hexadecimal."""
    return sha256(image).hexdigest()


@dataclass(frozen=True)
class FeatureCache:
    """Features of one kind. Data workers get a copy and read; the process that trains reads, writes and closes.

    `bound`: the most bytes of all folders in the root together.
    """

    root: Path
    kind: Kind
    place: Place
    bound: int
    _users: IO[bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return self.root / self.kind.key.hex()

    def path_of(self, image: str) -> Path:
        return self.folder / image[:2] / image

    def read(self, image: str) -> Features | None:
        """An image's features; None when they are not there. A flawed file is removed, and said."""
        path = self.path_of(image)
        try:
            return read(path, self.kind, image)
        except FileNotFoundError:
            return None
        except FlawError as flaw:
            _say_flaw(str(path.parent.parent), str(flaw))
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError as error:
            _say_flaw(str(path.parent.parent), str(error.strerror))
        return None

    def holds(self, image: str) -> bool:
        """Whether there is a file for an image, unread."""
        return self.path_of(image).is_file()

    def write(self, image: str, features: Features) -> bool:
        """Keep an image's features, on the CPU; False when another process did meanwhile.

        The room is taken before anything is written, under the lock: the bound holds for all writers together.

        Raises:
            FullError: by the bound, or by the disk.
            OSError: the folder cannot be written.
        """
        final = self.path_of(image)
        if final.is_file():
            return False
        header, values = encode(self.kind, image, features)
        size = len(header) + len(values)
        aside = self.folder / f".{image[:16]}-{socket.gethostname()}-{os.getpid()}-{next(_count)}"
        self._reserve(aside, size)
        try:
            with aside.open("r+b") as file:
                file.write(header)
                file.write(values)
            return self._publish(aside, final, size)
        except BaseException:
            with contextlib.suppress(OSError), self._locked() as used:
                aside.unlink()
                _add(used, -size)
            raise

    def _reserve(self, aside: Path, size: int) -> None:
        """Make the empty file at its full length, so that `recount` sees it, and count it."""
        with self._locked() as used:
            total = self.used_bytes()
            if total + size > self.bound:
                raise FullError(
                    f"{decimal_size(total)} of {decimal_size(self.bound)} are used{self._others()}"
                )
            disk = shutil.disk_usage(self.folder)
            if disk.free - size < SPARED * disk.total:
                raise FullError(
                    f"{decimal_size(disk.free)} of {decimal_size(disk.total)} are free on its disk, of which "
                    f"{SPARED:.0%} are spared"
                )
            with aside.open("xb") as file:
                file.truncate(size)
            _add(used, size)

    def _publish(self, aside: Path, final: Path, size: int) -> bool:
        with self._locked() as used:
            if final.is_file():
                aside.unlink()
                _add(used, -size)
                return False
            final.parent.mkdir(exist_ok=True)
            aside.rename(final)
            return True

    def recount(self) -> None:
        """Count the folder's bytes anew and remove what dead writers left."""
        with self._locked() as used:
            old = time.time() - ABANDONED_SECONDS
            total = 0
            for entry in _files(self.folder):
                with contextlib.suppress(FileNotFoundError):  # a reader removes what is flawed
                    if entry.name.startswith(".") and entry.stat().st_mtime < old:
                        Path(entry.path).unlink()
                    elif entry.name not in ("about.json", "used", "users"):
                        total += entry.stat().st_size
            os.pwrite(used, total.to_bytes(8, "little"), 0)

    def used_bytes(self) -> int:
        """Of all folders in the root."""
        return sum(_used(folder) for folder in feature_folders(self.root))

    def others_bytes(self) -> int:
        """Of the folders of other towers and settings."""
        return self.used_bytes() - _used(self.folder)

    def _others(self) -> str:
        """What to do when the room went to features that this run cannot use."""
        if not (others := self.others_bytes()):
            return "; raise SAMESTEP_VISION_CACHE_GB for more"
        others_size = decimal_size(others)
        return (
            f", {others_size} by other towers or settings; delete those in {self.root} that you need no more"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file `used`, locked. No process may be forked meanwhile: the child would hold the lock too."""
        descriptor = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """End the use of features in memory: the last user removes them."""
        if self._users is None or self._users.closed:
            return
        with self._users:
            if try_lock(self._users, fcntl.LOCK_EX):
                shutil.rmtree(self.folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.root.rmdir()


def open_cache(place: Place, kind: Kind, facts: Mapping[str, Any]) -> FeatureCache:
    """The cache of what `facts` name, made when it is not there.

    Raises:
        ConfigError: its folder cannot be made, belongs to somebody else, or the bound is no number.
    """
    root = root_of(place)
    folder = root / kind.key.hex()
    try:
        users = join_users(folder) if place == "memory" else None
        if users is None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.vision_cache: {folder} cannot be made ({error.strerror or error}); set SAMESTEP_VISION_CACHE to a "
            "folder that can be written, or data.vision_cache: off"
        ) from error
    cache = FeatureCache(root, kind, place, bound_of(place, root), users)
    if not (about := folder / "about.json").is_file():
        with contextlib.suppress(OSError):
            atomic_write(about, json.dumps(facts, indent=1, sort_keys=True))
    if place == "memory":
        remove_unused(mine=folder)
    return cache


def describe_cache(cache: FeatureCache, facts: Mapping[str, Any]) -> Iterator[str]:
    """Where features are kept and how many; which are of no use, and why."""
    kept = _used(cache.folder)
    yield (
        f"vision features: {cache.place}, {cache.folder}, {decimal_size(kept)} are there, at most "
        f"{decimal_size(cache.bound)}"
    )
    for folder in feature_folders(cache.root):
        if folder != cache.folder and (size := _used(folder)):
            try:
                why = describe_difference(facts, read_json(folder / "about.json"))
            except (OSError, ValueError, AttributeError):
                why = "nothing says what made them"
            yield f"vision features: {decimal_size(size)} in {folder} are ignored: {why}"


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path))
            else:
                yield entry


def _used(folder: Path) -> int:
    try:
        return int.from_bytes(read_bytes(folder / "used", 8), "little")
    except UNREADABLE:
        return 0


def _add(used: int, size: int) -> None:
    before = int.from_bytes(os.pread(used, 8, 0), "little")
    os.pwrite(used, max(0, before + size).to_bytes(8, "little"), 0)


@cache
def _say_flaw(folder: str, flaw: str) -> None:
    """Once for each reason and process."""
    logger.warning("vision features in %s: a file is ignored: %s; its image is computed again", folder, flaw)
