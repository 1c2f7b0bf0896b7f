"""A checkpoint's life cycle on files: written aside, published by a manifest written last, read, rotated.

Whoever fills `checkpoint-<step>.partial` (an empty folder to begin with) calls `publish` when every rank has
written its files; the caller owns that barrier. A folder without a manifest, or whose files are not what its
manifest says, counts as never published: a resuming run passes it over.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")


def aside_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is published."""
    return run_dir / f"checkpoint-{step}.partial"


def publish(aside: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make the complete folder `aside` the checkpoint `final`, at once or not at all.

    Every file reaches the disk before the manifest names it, and the manifest before the folder gets its
    name: a crash at any moment leaves either no checkpoint of that name or a whole one. A damaged folder in
    the place of `final` is replaced. `facts`: what the trainer wants to know on resuming (JSON).
    Raises CheckpointError when a sound checkpoint stands there already.
    """
    if _is_sound(final):
        raise CheckpointError(f"{final}: a checkpoint of this step is published; resume from it or remove it")
    files = {}
    for path in _files(aside):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(aside).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    _write_whole(aside / MANIFEST, json.dumps({"facts": facts, "files": files}, indent=1) + "\n")
    for folder in (*(path for path in aside.rglob("*") if path.is_dir()), aside):
        _sync_folder(folder)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync_folder(final.parent)


def read_manifest(folder: Path, verify: bool = False) -> dict[str, Any]:
    """The manifest of a published checkpoint: `facts` as published, `files` {name: {bytes, sha256}}.

    Raises CheckpointError naming every file that is missing or has another size; with `verify` also every
    file whose content has changed (which reads all of them).
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        }
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: is missing; the checkpoint was never completed, use an older one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use an older checkpoint") from None
    problems = [_damage(folder / name, size, digest, verify) for name, (size, digest) in files.items()]
    found = [problem for problem in problems if problem]
    if found:
        raise CheckpointError("\n".join(found))
    return manifest


def newest_published(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step whose manifest and files (by size) are there; None without one."""
    for _, folder in reversed(_checkpoints(run_dir)):
        if _is_sound(folder):
            return folder
    return None


def rotate(run_dir: Path, keep: int) -> None:
    """Remove the oldest published checkpoints beyond the `keep` newest.

    The newest is read back and its content verified first: CheckpointError, and nothing removed, when it is
    damaged. Folders that were never published are not counted and not touched.
    """
    if keep < 1:
        raise ValueError(f"keep {keep}: the newest checkpoint always stays")
    published = [folder for _, folder in _checkpoints(run_dir) if _is_sound(folder)]
    if len(published) <= keep:
        return
    read_manifest(published[-1], verify=True)
    for folder in published[:-keep]:
        (folder / MANIFEST).unlink()  # first, so that what a crash leaves behind is no checkpoint
        shutil.rmtree(folder)


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Folders named `checkpoint-<step>`, by step."""
    if not run_dir.is_dir():
        return []
    named = [(_CHECKPOINT.fullmatch(path.name), path) for path in run_dir.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def _is_sound(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _files(folder: Path) -> Iterator[Path]:
    """Every file below `folder` but a manifest of its own, in one order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)


def _damage(path: Path, size: int, digest: str, verify: bool) -> str | None:
    """What is wrong with one file, in words; None when it is as published."""
    if not path.is_file():
        return f"{path}: is missing ({size:,} bytes were published); use an older checkpoint"
    found = path.stat().st_size
    if found != size:
        return f"{path}: has another size ({found:,} bytes, {size:,} were published); use an older checkpoint"
    if verify:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        if content != digest:
            return (
                f"{path}: has another content (sha256 {content}, {digest} published); use an older checkpoint"
            )
    return None


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is either not there or complete, and on the disk."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
