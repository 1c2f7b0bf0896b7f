"""What was published of a checkpoint, and whether a folder still is that.

A checkpoint without a manifest, or which is not what its manifest says, counts as never published: a resuming run
passes it over and names it.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from launch.errors import CheckpointError
from launch.untrusted_files import TABLE, UNREADABLE, open_plain, printable, read_json, reason_of

MANIFEST = "manifest.json"
OPTIMIZER_FILE, SHARDS = "optimizer.safetensors", "shards"  # of a portable, and of a sharded checkpoint
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)(\.partial)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A file that is removed while somebody has it open keeps living under such a name on NFS (fs/nfs/unlink.c of
# Linux), and goes away with its last reader. The kernel makes it, nobody can avoid it and nothing here would
# read it: the one file that may lie beside the published ones. Notes, backups of editors or a `.DS_Store` may
# not: they cannot be told from the rest of another checkpoint.
_NFS_LEFTOVER = re.compile(r"\.nfs[0-9a-f]{24}")
OLDER = "use an older checkpoint"
"""What to do about a damaged one, in its message, while there are older ones."""

Entries = dict[str, dict[str, Any]]
"""Name of a file in a checkpoint -> its {bytes, sha256}."""


def read_manifest(folder: Path, verify: bool = False) -> dict[str, Any]:
    """Read the manifest of a published checkpoint: `facts` (metadata) as published, `files` {name: {bytes, sha256}}.

    Raises CheckpointError, a line for every file that is missing, has another size, is no plain file or was
    not published; with `verify` also for every file whose content has changed (which reads all of them).
    """
    manifest = load_manifest(folder / MANIFEST)
    if problems := list(file_differences(folder, manifest["files"], verify)):
        raise CheckpointError("\n".join(problems))
    return manifest


def load_manifest(path: Path) -> dict[str, Any]:
    """A manifest that is complete, as it was written, and of this folder. CheckpointError says what is not so."""
    try:
        if problem := not_plain(path, path.lstat().st_mode):  # a pipe would be waited for
            raise CheckpointError(problem)
        manifest: dict[str, Any] = read_json(path, TABLE)
        if not isinstance(manifest, dict) or not manifest.keys() >= {"facts", "files", "sha256"}:
            raise CheckpointError(f"{path}: is no manifest (facts, files and sha256 are needed); {OLDER}")
        sealed, seal = str(manifest["sha256"]), checksum_of(manifest["facts"], manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; the checkpoint was never completed, {OLDER}") from None
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); {OLDER}") from None
    if seal != sealed:
        raise CheckpointError(_other_content(path, seal, printable(sealed)))
    if problems := list(_impossible(path, manifest["facts"], manifest["files"])):
        raise CheckpointError("\n".join(problems))
    return manifest


def _impossible(path: Path, metadata: object, files: object) -> Iterator[str]:
    """What `publish` would not have written into a manifest, a line each."""
    if not isinstance(metadata, dict) or not _is_count(step := metadata.get("step")):
        yield f"{path}: its facts name no step ({printable(repr(metadata))[:80]}); {OLDER}"
    elif (named := CHECKPOINT_NAME.fullmatch(path.parent.name)) and int(named[1]) != step:
        yield (
            f"{path}: is of another step than its folder ({step}, the folder says {named[1]}); "
            f"rename the folder if you know what it holds, or {OLDER}"
        )
    if not isinstance(files, dict):
        yield f"{path}: its files are no mapping ({printable(repr(files))[:80]}); {OLDER}"
        return
    for name, entry in files.items():
        if not _is_inside(name):
            yield f"{path}: lists a file that cannot be in the folder ({name!a}); {OLDER}"
        elif (
            not isinstance(entry, dict)
            or not _is_count(entry.get("bytes"))
            or not _SHA256.fullmatch(str(entry.get("sha256")))
        ):
            yield f"{path}: has no size and sha256 of {name!a} ({printable(repr(entry))[:80]}); {OLDER}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_inside(name: str) -> bool:
    """A relative name in its one spelling that stays in the folder and is not the manifest's."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return plain and path.as_posix() == name and name not in (".", MANIFEST)


def file_differences(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> Iterator[str]:
    """Every way in which a folder is not what its manifest says, a line each."""
    statuses, unlisted = entries(folder)
    yield from unlisted
    for name, entry in files.items():
        if damage := _damage(folder / name, entry["bytes"], entry["sha256"], verify):
            yield damage
    for name, status in statuses.items():
        if {name, *(parent.as_posix() for parent in PurePosixPath(name).parents)} & files.keys():
            continue  # published, or below a folder that took the place of a file, which is named already
        if name != MANIFEST:
            yield (
                f"{printable(str(folder / name))}: was not published ({status.st_size:,} bytes, not in "
                f"{MANIFEST}); move it away, or {OLDER}"
            )


def _damage(path: Path, size: int, digest: str, verify: bool) -> str | None:
    """What is wrong with one published file, in words; None when it is as published."""
    name = printable(str(path))
    try:
        status = path.lstat()
        if problem := not_plain(path, status.st_mode):
            return problem
        if status.st_size != size:
            return f"{name}: has another size ({status.st_size:,} bytes, {size:,} were published); {OLDER}"
        if verify and (content := _digest(path)) != digest:
            return _other_content(path, content, digest)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name}: is missing ({size:,} bytes were published); {OLDER}"
    except (OSError, ValueError) as error:  # ValueError: a name that no file system has
        return f"{name}: cannot be read ({reason_of(error)}); {OLDER}"
    return None


def entries(folder: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """Everything below `folder` that is not itself a folder, by name; and what could not be listed, a line each.

    Empty folders are nothing: no content is lost or added with them. Links are not followed.
    """
    statuses: dict[str, os.stat_result] = {}
    errors: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=errors.append):
        for path in (Path(place, name) for name in (*files, *folders)):
            try:
                status = path.lstat()
            except OSError as error:
                errors.append(error)
                continue
            leftover = stat.S_ISREG(status.st_mode) and _NFS_LEFTOVER.fullmatch(path.name)
            if not stat.S_ISDIR(status.st_mode) and not leftover:
                statuses[path.relative_to(folder).as_posix()] = status
    problems = [
        f"{printable(str(error.filename))}: cannot be read ({reason_of(error)}); give permission, or {OLDER}"
        for error in errors
    ]
    return dict(sorted(statuses.items())), problems


def not_plain(path: Path, mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    kind = (
        "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
    )
    return f"{printable(str(path))}: is no plain file ({kind}); {OLDER}"


def _other_content(path: Path, digest: str, published: str) -> str:
    return f"{printable(str(path))}: has another content (sha256 {digest}, {published} published); {OLDER}"


def _digest(path: Path) -> str:
    with open_plain(path, follow_symlinks=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto


def checksum_of(metadata: object, files: object) -> str:
    """sha256 of what a manifest says: no other file would notice a changed bit in it."""
    return hashlib.sha256(
        json.dumps({"facts": metadata, "files": files}, sort_keys=True).encode()
    ).hexdigest()
