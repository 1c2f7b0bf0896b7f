"""Any checkpoint that holds a LoRA, ours or another library's, read into one form on one CPU.

`import_checkpoint` finds out which form it is by the files that lie there; nothing is started and nothing is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launch.checkpoints.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launch.checkpoints.manifest import MANIFEST, SHARDS, read_manifest
from launch.errors import CheckpointError
from launch.untrusted_files import TABLE, printable
from trainer.formats.forms import (
    CHECKPOINT_FORMS,
    DISTRIBUTED,
    FULL,
    from_adapter,
    from_shards,
    from_weights,
    shards_of,
)
from trainer.formats.imported import ImportedCheckpoint
from trainer.formats.validated import (
    read_json_object,
    refuse_more_than_memory,
    unreadable_is_refused,
    whole_number,
)

TRAINER_STATE = "trainer_state.json"


@unreadable_is_refused()
def import_checkpoint(source: Path) -> ImportedCheckpoint:
    """Read a checkpoint of any form.

    Raises:
        CheckpointError: it is of no known form, incomplete (every missing file is named), or holds no LoRA.
    """
    source = source.expanduser()
    if not source.exists():
        raise CheckpointError(
            f"{source}: no such folder; give a run directory, a checkpoint or an adapter folder"
        )
    imported = _read(source)
    if not imported.tensors:
        raise CheckpointError(
            f"{imported.source}: holds no tensors of an adapter ({imported.form}); {_WHY_EMPTY}"
        )
    if empty := [key for key, tensor in imported.tensors.items() if tensor.numel() == 0]:
        raise CheckpointError(
            f"{imported.source}: {len(empty)} of {len(imported.tensors)} tensors are empty ({printable(empty[0])}); "
            "it was saved without gathering what the ranks hold, give the folder with every rank's part"
        )
    refuse_more_than_memory(
        sum(tensor.nbytes for tensor in (*imported.tensors.values(), *imported.optimizer_state.values())),
        imported.source,
    )
    return _with_config(_with_step(imported))


_WHY_EMPTY = (
    "FSDP version 1 with SHARDED_STATE_DICT saves a PEFT model so, without an error: take a checkpoint of "
    "FSDP version 2, or save with FULL_STATE_DICT"
)


def _read(source: Path) -> ImportedCheckpoint:
    if source.is_file():
        return from_weights(source, [source])
    if (source / MANIFEST).is_file():  # one of ours: every file as it was published
        read_manifest(source, verify=True)
    for find, read in CHECKPOINT_FORMS:
        if (place := find(source)) is not None:
            return read(place)
    if (source / "adapter" / ADAPTER_CONFIG).is_file():  # a run directory
        return from_adapter(source / "adapter")
    raise CheckpointError(
        f"{source}: no adapter, and no checkpoint of a known form in it ({ADAPTER_WEIGHTS}, {DISTRIBUTED}/, {FULL}, "
        "DeepSpeed's global_step<N>/ or universal folder, model.safetensors of `accelerate merge-weights`); a run has "
        "an adapter/ when it is done, until then give one of its checkpoint-<step> folders"
    )


@unreadable_is_refused()
def read_sharded(checkpoint: Path) -> ImportedCheckpoint | None:
    """Read a sharded checkpoint of ours, of any number of ranks, verified before; None for another form."""
    shards = shards_of(checkpoint)
    return None if shards is None else from_shards(shards)


def _holders(imported: ImportedCheckpoint) -> list[Path]:
    """Return the folders that belong to a checkpoint: where it was read, and around a part of it the whole."""
    folder = imported.source if imported.source.is_dir() else imported.source.parent
    is_part = (
        folder.name in (DISTRIBUTED, SHARDS)
        or folder.name.startswith("global_step")
        or "universal" in folder.name
    )
    return [folder, folder.parent] if is_part else [folder]


def _with_step(imported: ImportedCheckpoint) -> ImportedCheckpoint:
    for folder in _holders(imported):
        if (folder / MANIFEST).is_file():
            return _with_losses(replace(imported, step=int(read_manifest(folder)["facts"]["step"])))
        if (folder / TRAINER_STATE).is_file():
            step = read_json_object(folder / TRAINER_STATE, TABLE).get("global_step")
            if step is None:
                return _with_losses(imported)
            return _with_losses(
                replace(imported, step=whole_number(step, folder / TRAINER_STATE, "global_step"))
            )
    return _with_losses(imported)


def _with_losses(imported: ImportedCheckpoint) -> ImportedCheckpoint:
    lost = [] if imported.optimizer_state else ["the optimizer's moments"]
    lost += [] if imported.step is not None else ["the number of steps"]
    return replace(imported, lost=tuple(lost))


def _with_config(imported: ImportedCheckpoint) -> ImportedCheckpoint:
    for folder in _holders(imported):
        if (folder / ADAPTER_CONFIG).is_file():
            return replace(
                imported,
                config=read_json_object(folder / ADAPTER_CONFIG),
                config_file=folder / ADAPTER_CONFIG,
            )
    return imported
