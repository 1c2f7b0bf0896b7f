"""Digests of whole files, each byte read once: what was read is remembered in the cache. Torch-free.

A large file is recognized by its path, size, inode and times of change, the one of the inode (ctime) among them: no
program sets that, so a file that is rewritten and given its old time back (`rsync -t`, `tar`) is read again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.errors import ConfigError
from launch.inputs.caches import cache_root
from launch.untrusted_files import LINE, UNREADABLE, UntrustedFileError, open_plain, read_mapping

REMEMBERED = 4 << 20
"""Bytes from which on a file's digest is remembered: below, reading is as fast as looking up."""
ANNOUNCED = 1 << 30
"""Bytes that are announced before they are read: they take longer than a second or so."""
SETTLED_S = 2.0
"""How old a change must be before a digest is remembered: another one within the clock's step would not show."""
_BLOCK = 8 << 20
_known: dict[_State, str] = {}  # by this process, whose cache may be read-only


@dataclass(frozen=True)
class _State:
    """What tells one content of a file from the next, without reading it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def files_digest(files: Sequence[Path]) -> str:
    """Return one digest (hexadecimal, 32 digits) of the names and all bytes of some files; what large ones hold is
    remembered.

    Raises:
        ConfigError: a file cannot be read, is no plain file, or changes while it is read.
    """
    parts = [f"{file.name} {digest}" for file, digest in zip(files, _digests(files), strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _digests(files: Sequence[Path]) -> list[str]:
    remembered = [_recall(state) if (state := _state_of(file)).size >= REMEMBERED else None for file in files]
    unknown = [file for file, digest in zip(files, remembered, strict=True) if digest is None]
    states = [_state_of(file) for file in unknown]
    if sum(state.size for state in states) < REMEMBERED:
        return [digest or _read(file) for file, digest in zip(files, remembered, strict=True)]
    with _one_at_a_time(states):  # of several processes or nodes one reads, the others find it remembered
        total = sum(state.size for state in states if _recall(state) is None)
        if total >= ANNOUNCED:
            with contextlib.suppress(OSError):  # nobody may be there to hear
                print(
                    f"{unknown[0].parent}: reading {total / 1e9:.1f} GB once, to know its content by a digest",
                    file=sys.stderr,
                    flush=True,
                )
        return [
            digest or _recall(_state_of(file)) or _read(file)
            for file, digest in zip(files, remembered, strict=True)
        ]


def _state_of(file: Path) -> _State:
    """Of a file as it is now: it is opened, for NFS may answer `stat` with what was true a minute ago."""
    try:
        path = file.resolve(strict=True)
        with open_plain(path, buffering=0) as handle:
            return _state(path, os.fstat(handle.fileno()))
    except UntrustedFileError as error:
        raise ConfigError(f"{path}: {error.reason}; copy the folder again") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _unreadable(file, error) from None


def _state(path: Path, status: os.stat_result) -> _State:
    return _State(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}); give permission, or copy it again"
    )


def _read(file: Path) -> str:
    """The digest of all bytes, remembered where the file is large and has come to rest."""
    import xxhash

    before = _state_of(file)
    digest = xxhash.xxh3_128()
    try:
        with open_plain(before.path, buffering=0) as handle:
            begun = _state(Path(before.path), os.fstat(handle.fileno()))
            block = bytearray(min(_BLOCK, max(1, begun.size)))
            while count := handle.readinto(block):  # type: ignore[attr-defined]
                digest.update(memoryview(block)[:count])
            ended = _state(Path(before.path), os.fstat(handle.fileno()))
    except OSError as error:
        raise _unreadable(file, error) from None
    if not before == begun == ended:
        raise ConfigError(f"{file}: changed while it was read; start again when nothing writes to it")
    if ended.size >= REMEMBERED and time.time() - ended.ctime_ns / 1e9 > SETTLED_S:
        _remember(ended, digest.hexdigest())
    return digest.hexdigest()


def _place(*states: _State, kind: str = "json") -> Path:
    """Not by the path alone: nodes that share the cache have each a copy of their own on a disk of their own."""
    name = hashlib.sha256(repr(states).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_root() / "digests" / f"{name}.{kind}"


def _recall(state: _State) -> str | None:
    if state in _known:
        return _known[state]
    try:
        record = read_mapping(_place(state), LINE)
    except UNREADABLE:
        return None
    digest = record.get("digest")
    return digest if isinstance(digest, str) and record.get("file") == asdict(state) else None


def _remember(state: _State, digest: str) -> None:
    """A cache that cannot be written costs another reading by the next process, nothing else."""
    _known[state] = digest
    place = _place(state)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, json.dumps({"file": asdict(state), "digest": digest}))


@contextmanager
def _one_at_a_time(states: Sequence[_State]) -> Iterator[None]:
    """While these large files are read. Where the cache cannot be written or locked, several may read at once."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            place = _place(*states, kind="lock")
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = held.enter_context(place.open("a"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
