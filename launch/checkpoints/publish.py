"""A checkpoint is written aside and becomes one at once: its manifest is written last, then the folder gets its name.

Its last steps are those of every folder (`launch.atomic_files`); what differs is that many ranks fill it, and that a
manifest says what is in it.

Whoever fills `checkpoint-<step>.partial` (an empty folder to begin with) calls `publish` when every rank has written
its files; the caller owns that barrier.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write, rename_durably, sync_tree
from launch.checkpoints.manifest import CHECKPOINT_NAME, MANIFEST, Entries, checksum_of, entries, not_plain
from launch.checkpoints.rotation import remove, rename_away
from launch.checkpoints.scan import inspect_checkpoint
from launch.errors import CheckpointError
from launch.untrusted_files import printable


def partial_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is published."""
    return run_dir / f"checkpoint-{step}.partial"


def sync_and_hash(aside: Path, names: Iterable[str]) -> Entries:
    """Flush files of an unpublished checkpoint; what the manifest will say of them. Every rank does it for its own."""
    return {name: _bring_to_disk(aside / name) for name in names}


def publish(
    aside: Path, final: Path, metadata: dict[str, Any], replace: bool = False, known: Entries | None = None
) -> None:
    """Make the complete folder `aside` the checkpoint `final`, at once or not at all.

    Every file reaches the disk before the manifest names it, and the manifest before the folder gets its
    name: a crash at any moment leaves either no checkpoint of that name or a whole one. A damaged folder in
    the place of `final` is replaced. `metadata`: what the trainer wants to know on resuming (JSON); its `step`
    is the one in the name of `final`. `known`: of `sync_and_hash` on the ranks that wrote these files.
    Raises CheckpointError when a file is known and not seen here (its rank writes to another disk), when a valid
    checkpoint stands there already (its whole content is read) and is not to be replaced, or when `aside` holds
    what is no plain file.
    """
    named = CHECKPOINT_NAME.fullmatch(final.name)
    if not named or named[2] or metadata.get("step") != int(named[1]):
        raise ValueError(
            f"{final}: facts of step {metadata.get('step')} do not belong to a folder of this name"
        )
    stands = not replace and os.path.lexists(final)
    if stands and inspect_checkpoint(final, int(named[1]), published=True, verify=True).valid:
        raise CheckpointError(f"{final}: a checkpoint of this step is published; resume from it or remove it")
    (aside / MANIFEST).unlink(missing_ok=True)  # of an attempt that failed
    present, problems = entries(aside)
    problems += filter(None, (not_plain(aside / name, status.st_mode) for name, status in present.items()))
    known = known or {}
    sizes = {name: status.st_size for name, status in present.items()}
    problems += (
        f"{printable(str(aside / name))}: another rank wrote it ({entry['bytes']:,} bytes) and it is not seen here "
        f"({sizes.get(name, 0):,} bytes); put the run directory on a disk that all nodes share"
        for name, entry in known.items()
        if sizes.get(name) != entry["bytes"]
    )
    if problems:
        raise CheckpointError("\n".join(problems))
    files = {name: known.get(name) or _bring_to_disk(aside / name) for name in present}
    # What JSON makes of the metadata (text keys, lists) is what will be read back and sealed again.
    content = json.loads(json.dumps({"facts": metadata, "files": files}))
    sealed = {**content, "sha256": checksum_of(content["facts"], content["files"])}
    atomic_write(aside / MANIFEST, json.dumps(sealed, indent=1) + "\n")
    sync_tree(aside, flushed={aside / MANIFEST, *(aside / name for name in files)})
    replaced = rename_away(final) if os.path.lexists(final) else None
    rename_durably(aside, final)
    if replaced:
        remove(replaced)


def _bring_to_disk(path: Path) -> dict[str, Any]:
    """Flush a file; returns its entry in the manifest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
