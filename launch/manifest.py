"""A checkpoint's life cycle on files: written aside, published by a manifest written last, verified, rotated.

Whoever fills `checkpoint-<step>.partial` (an empty folder to begin with) calls `publish` when every rank has
written its files; the caller owns that barrier. What has no manifest, or is not what its manifest says, counts
as never published: a resuming run passes it over and names it.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from launch.errors import CheckpointError

MANIFEST = "manifest.json"
_DRAFT = MANIFEST + ".tmp"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)(\.partial)?")
_REMOVED = re.compile(r"checkpoint-[0-9]+\.removed-[0-9]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A file that is removed while somebody has it open keeps living under such a name on NFS (fs/nfs/unlink.c of
# Linux), and goes away with its last reader. The kernel makes it, nobody can avoid it and nothing here would
# read it: the one file that may lie beside the published ones. Notes, backups of editors or a `.DS_Store` may
# not: they cannot be told from the rest of another checkpoint.
_NFS_LEFTOVER = re.compile(r"\.nfs[0-9a-f]{24}")
_OLDER = "use an older checkpoint"

Entries = dict[str, dict[str, Any]]
"""Name of a file in a checkpoint -> its {bytes, sha256}."""


@dataclass(frozen=True)
class Checkpoint:
    """One folder of a run, as found. `facts`: as published ({} when not known); `bytes`: on the disk."""

    folder: Path
    step: int
    published: bool
    facts: dict[str, Any]
    bytes: int
    problems: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """A run can go on from it."""
        return self.published and not self.problems


def aside_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is published."""
    return run_dir / f"checkpoint-{step}.partial"


# publishing and reading -------------------------------------------------------------------


def bring_to_disk(aside: Path, names: Iterable[str]) -> Entries:
    """Flush files of an unpublished checkpoint; what the manifest will say of them. Every rank does it for its own."""
    return {name: _bring_to_disk(aside / name) for name in names}


def publish(
    aside: Path, final: Path, facts: dict[str, Any], replace: bool = False, known: Entries | None = None
) -> None:
    """Make the complete folder `aside` the checkpoint `final`, at once or not at all.

    Every file reaches the disk before the manifest names it, and the manifest before the folder gets its
    name: a crash at any moment leaves either no checkpoint of that name or a whole one. A damaged folder in
    the place of `final` is replaced. `facts`: what the trainer wants to know on resuming (JSON); its `step`
    is the one in the name of `final`. `known`: of `bring_to_disk` on the ranks that wrote these files.
    Raises CheckpointError when a file is known and not seen here (its rank writes to another disk), when a valid
    checkpoint stands there already (its whole content is read) and is not to be replaced, or when `aside` holds
    what is no plain file.
    """
    named = _NAME.fullmatch(final.name)
    if not named or named[2] or facts.get("step") != int(named[1]):
        raise ValueError(f"{final}: facts of step {facts.get('step')} do not belong to a folder of this name")
    stands = not replace and os.path.lexists(final)
    if stands and _examine(final, int(named[1]), published=True, verify=True).valid:
        raise CheckpointError(f"{final}: a checkpoint of this step is published; resume from it or remove it")
    for leftover in (MANIFEST, _DRAFT):  # of an attempt that failed
        (aside / leftover).unlink(missing_ok=True)
    found, problems = _entries(aside)
    problems += filter(None, (_not_plain(aside / name, status.st_mode) for name, status in found.items()))
    known = known or {}
    sizes = {name: status.st_size for name, status in found.items()}
    problems += (
        f"{printable(str(aside / name))}: another rank wrote it ({entry['bytes']:,} bytes) and it is not seen here "
        f"({sizes.get(name, 0):,} bytes); put the run directory on a disk that all nodes share"
        for name, entry in known.items()
        if sizes.get(name) != entry["bytes"]
    )
    if problems:
        raise CheckpointError("\n".join(problems))
    files = {name: known.get(name) or _bring_to_disk(aside / name) for name in found}
    # What JSON makes of the facts (text keys, lists) is what will be read back and sealed again.
    content = json.loads(json.dumps({"facts": facts, "files": files}))
    sealed = {**content, "sha256": _seal(content["facts"], content["files"])}
    _write_whole(aside / MANIFEST, json.dumps(sealed, indent=1) + "\n")
    for folder in (*(path for path in aside.rglob("*") if path.is_dir()), aside):
        _sync_folder(folder)
    replaced = _rename_away(final) if os.path.lexists(final) else None
    aside.rename(final)
    _sync_folder(final.parent)
    if replaced:
        _discard(replaced)


def read_manifest(folder: Path, verify: bool = False) -> dict[str, Any]:
    """The manifest of a published checkpoint: `facts` as published, `files` {name: {bytes, sha256}}.

    Raises CheckpointError, a line for every file that is missing, has another size, is no plain file or was
    not published; with `verify` also for every file whose content has changed (which reads all of them).
    """
    manifest = _load(folder / MANIFEST)
    if problems := list(_differences(folder, manifest["files"], verify)):
        raise CheckpointError("\n".join(problems))
    return manifest


def survey(
    run_dir: Path, verify: bool = True, telling: Callable[[Path], None] = lambda _: None
) -> list[Checkpoint]:
    """Every checkpoint of a run, published or not, oldest step first.

    With `verify` the whole content is read; `telling` hears of each folder before. Raises CheckpointError
    when the run's folder itself cannot be read: nothing found there would mean that nothing is there.
    """
    found = []
    for step, published, folder in _folders(run_dir):
        telling(folder)
        found.append(_examine(folder, step, published, verify))
    # A run under way may have published, or rotated away, what it had a moment ago.
    return [checkpoint for checkpoint in found if os.path.lexists(checkpoint.folder)]


def newest_valid(run_dir: Path) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The checkpoint of the highest step whose whole content verifies, and what is newer but cannot be used.

    The latter newest first. Reads content from the newest down to the first valid one and no further.
    Raises CheckpointError when the run's folder itself cannot be read.
    """
    passed_over: list[Checkpoint] = []
    for step, published, folder in reversed(_folders(run_dir)):
        checkpoint = _examine(folder, step, published, verify=True)
        if checkpoint.valid:
            return checkpoint, passed_over
        passed_over.append(checkpoint)
    return None, passed_over


# removing ---------------------------------------------------------------------------------


def rotate(run_dir: Path, keep: int, newest: int | None = None) -> None:
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
        for step, published, folder in _folders(run_dir)
        if published and (newest is None or step <= newest)
    ]
    if len(published) <= keep:
        return
    wanted, older = keep, []
    for step, folder in reversed(published):
        if wanted:
            wanted -= _examine(folder, step, published=True, verify=True).valid
        elif _examine(folder, step, published=True, verify=False).valid:
            older.append(folder)
    for folder in reversed(older):
        removed = _rename_away(folder)
        _sync_folder(run_dir)  # or a power cut could bring back the name without some of the files
        _discard(removed)


def clear_unpublished(run_dir: Path) -> list[Path]:
    """Remove what was being written when a run was killed. The caller holds the run's lock.

    Returns the folders that lay there. Raises CheckpointError when one cannot be removed.
    """
    _finish_removals(run_dir)
    unpublished = [folder for _, published, folder in _folders(run_dir) if not published]
    for folder in unpublished:
        try:
            _remove(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: the rest of a killed save cannot be removed ({_reason(error)}); "
                "remove it or give permission"
            ) from None
    return unpublished


def _finish_removals(run_dir: Path) -> None:
    """Remove what a crash, or a reader on NFS, left of checkpoints that were taken away."""
    for path, _ in _named(run_dir, _REMOVED):
        _discard(path)


def _rename_away(folder: Path) -> Path:
    """Give a checkpoint a name that is none, in one step; returns it."""
    names = (folder.with_name(f"{folder.name}.removed-{number}") for number in itertools.count())
    return folder.rename(next(path for path in names if not os.path.lexists(path)))


def _discard(path: Path) -> None:
    """Remove what no longer counts. A file that a reader holds open on NFS must not end the run over it."""
    with suppress(OSError):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# examining --------------------------------------------------------------------------------


def _folders(run_dir: Path) -> list[tuple[int, bool, Path]]:
    """(step, published, path) of everything named like a checkpoint, by step; unpublished before published."""
    return sorted((int(match[1]), not match[2], path) for path, match in _named(run_dir, _NAME))


def _named(run_dir: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    try:
        return [(path, match) for path in run_dir.iterdir() if (match := pattern.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: cannot be read ({_reason(error)}); give permission, or choose another run"
        ) from None


def _examine(folder: Path, step: int, published: bool, verify: bool) -> Checkpoint:
    """What is to be known of one folder. Raises nothing: whatever is wrong becomes a problem."""
    size = sum(status.st_size for status in _entries(folder)[0].values())
    if not published:
        never = (
            f"{folder}: was never published (killed while it was written, or being written now); "
            "a run that resumes removes it"
        )
        return Checkpoint(folder, step, published, {}, size, (never,))
    try:
        manifest = _load(folder / MANIFEST)
    except CheckpointError as error:
        return Checkpoint(folder, step, published, {}, size, tuple(str(error).splitlines()))
    problems = tuple(_differences(folder, manifest["files"], verify))
    return Checkpoint(folder, step, published, manifest["facts"], size, problems)


def _load(path: Path) -> dict[str, Any]:
    """A manifest that is complete, as it was written, and of this folder. CheckpointError says what is not so."""
    try:
        if problem := _not_plain(path, path.lstat().st_mode):  # a pipe would be waited for
            raise CheckpointError(problem)
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not manifest.keys() >= {"facts", "files", "sha256"}:
            raise CheckpointError(f"{path}: is no manifest (facts, files and sha256 are needed); {_OLDER}")
        sealed, seal = str(manifest["sha256"]), _seal(manifest["facts"], manifest["files"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; the checkpoint was never completed, {_OLDER}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)}); {_OLDER}") from None
    if seal != sealed:
        raise CheckpointError(_other_content(path, seal, printable(sealed)))
    if problems := list(_impossible(path, manifest["facts"], manifest["files"])):
        raise CheckpointError("\n".join(problems))
    return manifest


def _impossible(path: Path, facts: object, files: object) -> Iterator[str]:
    """What `publish` would not have written into a manifest, a line each."""
    if not isinstance(facts, dict) or not _is_count(step := facts.get("step")):
        yield f"{path}: its facts name no step ({printable(repr(facts))[:80]}); {_OLDER}"
    elif (named := _NAME.fullmatch(path.parent.name)) and int(named[1]) != step:
        yield (
            f"{path}: is of another step than its folder ({step}, the folder says {named[1]}); "
            f"rename the folder if you know what it holds, or {_OLDER}"
        )
    if not isinstance(files, dict):
        yield f"{path}: its files are no mapping ({printable(repr(files))[:80]}); {_OLDER}"
        return
    for name, entry in files.items():
        if not _is_inside(name):
            yield f"{path}: lists a file that cannot be in the folder ({name!a}); {_OLDER}"
        elif (
            not isinstance(entry, dict)
            or not _is_count(entry.get("bytes"))
            or not _SHA256.fullmatch(str(entry.get("sha256")))
        ):
            yield f"{path}: has no size and sha256 of {name!a} ({printable(repr(entry))[:80]}); {_OLDER}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_inside(name: str) -> bool:
    """A relative name in its one spelling that stays in the folder and is not the manifest's."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return plain and path.as_posix() == name and name not in (".", MANIFEST)


def _differences(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> Iterator[str]:
    """Every way in which a folder is not what its manifest says, a line each."""
    found, unlisted = _entries(folder)
    yield from unlisted
    for name, entry in files.items():
        if damage := _damage(folder / name, entry["bytes"], entry["sha256"], verify):
            yield damage
    for name, status in found.items():
        if {name, *(parent.as_posix() for parent in PurePosixPath(name).parents)} & files.keys():
            continue  # published, or below a folder that took the place of a file, which is named already
        if name != MANIFEST:
            yield (
                f"{printable(str(folder / name))}: was not published ({status.st_size:,} bytes, not in "
                f"{MANIFEST}); move it away, or {_OLDER}"
            )


def _damage(path: Path, size: int, digest: str, verify: bool) -> str | None:
    """What is wrong with one published file, in words; None when it is as published."""
    name = printable(str(path))
    try:
        status = path.lstat()
        if problem := _not_plain(path, status.st_mode):
            return problem
        if status.st_size != size:
            return f"{name}: has another size ({status.st_size:,} bytes, {size:,} were published); {_OLDER}"
        if verify and (content := _digest(path)) != digest:
            return _other_content(path, content, digest)
    except (FileNotFoundError, NotADirectoryError):
        return f"{name}: is missing ({size:,} bytes were published); {_OLDER}"
    except (OSError, ValueError) as error:  # ValueError: a name that no file system has
        return f"{name}: cannot be read ({_reason(error)}); {_OLDER}"
    return None


def _entries(folder: Path) -> tuple[dict[str, os.stat_result], list[str]]:
    """Everything below `folder` that is not itself a folder, by name; and what could not be listed, a line each.

    Empty folders are nothing: no content is lost or added with them. Links are not followed.
    """
    found: dict[str, os.stat_result] = {}
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
                found[path.relative_to(folder).as_posix()] = status
    problems = [
        f"{printable(str(error.filename))}: cannot be read ({_reason(error)}); give permission, or {_OLDER}"
        for error in errors
    ]
    return dict(sorted(found.items())), problems


def printable(text: str) -> str:
    """One line that every terminal takes: a file's name may hold line breaks and bytes of no encoding."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _not_plain(path: Path, mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    kind = (
        "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
    )
    return f"{printable(str(path))}: is no plain file ({kind}); {_OLDER}"


def _other_content(path: Path, found: str, published: str) -> str:
    return f"{printable(str(path))}: has another content (sha256 {found}, {published} published); {_OLDER}"


def _reason(error: Exception) -> str:
    """An error's words without the path, which is said already."""
    return printable(getattr(error, "strerror", None) or str(error))


# bytes and disks --------------------------------------------------------------------------


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(facts: object, files: object) -> str:
    """sha256 of what a manifest says: no other file would notice a changed bit in it."""
    return hashlib.sha256(json.dumps({"facts": facts, "files": files}, sort_keys=True).encode()).hexdigest()


def _bring_to_disk(path: Path) -> dict[str, Any]:
    """Flush a file; returns its entry in the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is either not there or complete, and on the disk."""
    draft = path.with_name(_DRAFT)
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
