"""Any checkpoint that holds a LoRA, ours or another library's, read into one form on one CPU.

`import_checkpoint` finds out which form it is by the files that lie there; nothing is started and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoints.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launch.checkpoints.manifest import MANIFEST, OPTIMIZER_FILE, SHARDS, read_manifest
from launch.errors import CheckpointError
from launch.untrusted_files import TABLE, printable
from trainer.formats.dcp import distributed_keys, load_distributed
from trainer.formats.deepspeed import ZeroState, read_universal, read_zero, universal_folder, zero_folder
from trainer.formats.key_names import adapter_key, adapter_keys, is_lora, parameter_name
from trainer.formats.optimizer_state import by_index, by_name
from trainer.formats.safetensors_blocks import read_shard, read_weight_map
from trainer.formats.torch_files import load_mapping, mapping
from trainer.formats.validated import (
    read_json_object,
    read_tensors,
    refuse_more_than_memory,
    unreadable_is_refused,
    whole_number,
)

DISTRIBUTED, DISTRIBUTED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
FULL, FULL_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
OPTIMIZER_PREFIX = "optimizer.state."
NUMBERED_OPTIMIZER, TRAINER_STATE = "optimizer.pt", "trainer_state.json"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class ImportedCheckpoint:
    """What a checkpoint holds of a LoRA training.

    `tensors`: by the keys of PEFT's adapter file, as stored. `config`: its adapter_config.json, if one lies there.
    `written_as`: the keys under which older versions wrote them, where they differ.
    `optimizer_state`: `<parameter>.exp_avg`, `.exp_avg_sq` and `.step` by a PeftModel's parameter names, or empty.
    `step`: optimizer steps made, if the form says it. `lost`: what a training would need and is not there, in words.
    """

    source: Path
    form: str
    tensors: dict[str, Tensor]
    written_as: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    config_file: Path | None = None
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    step: int | None = None
    lost: tuple[str, ...] = ()


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
        return _from_weights(source, [source])
    if (source / MANIFEST).is_file():  # one of ours: every file as it was published
        read_manifest(source, verify=True)
    for find, read in _FORMS:
        if (place := find(source)) is not None:
            return read(place)
    if (source / "adapter" / ADAPTER_CONFIG).is_file():  # a run directory
        return _from_adapter(source / "adapter")
    raise CheckpointError(
        f"{source}: no adapter, and no checkpoint of a known form in it ({ADAPTER_WEIGHTS}, {DISTRIBUTED}/, {FULL}, "
        "DeepSpeed's global_step<N>/ or universal folder, model.safetensors of `accelerate merge-weights`); a run has "
        "an adapter/ when it is done, until then give one of its checkpoint-<step> folders"
    )


@unreadable_is_refused()
def read_sharded(checkpoint: Path) -> ImportedCheckpoint | None:
    """Read a sharded checkpoint of ours, of any number of ranks, verified before; None for another form."""
    shards = _shards(checkpoint)
    return None if shards is None else _from_shards(shards)


# The forms: where it lies, and how it is read --------------------------------------------


def _shards(source: Path) -> Path | None:
    return source / SHARDS if (source / SHARDS).is_dir() else None


def _from_shards(folder: Path) -> ImportedCheckpoint:
    zero = zero_folder(folder)
    if zero is None:
        form = f"torch DCP, {len(list(folder.glob('*.distcp')))} files"
        imported = _read_distributed(folder, folder, form)
    else:
        imported = _from_zero_state(zero, read_zero(zero))
    return replace(imported, source=folder.parent, form=f"sharded checkpoint of samestep ({imported.form})")


def _distributed(source: Path) -> Path | None:
    if (source / ".metadata").is_file() or (source.name == DISTRIBUTED and any(source.glob("*.distcp"))):
        return source
    return source / DISTRIBUTED if (source / DISTRIBUTED).is_dir() else None


def _from_distributed(folder: Path) -> ImportedCheckpoint:
    form = f"FSDP, sharded ({len(list(folder.glob('*.distcp')))} files)"
    return _read_distributed(folder, folder.parent / DISTRIBUTED_OPTIMIZER, form)


def _read_distributed(folder: Path, optimizer: Path, form: str) -> ImportedCheckpoint:
    """`optimizer`: the folder with the optimizer state, which may be the same one."""
    names = [name for name in distributed_keys(folder) if not name.startswith("optimizer.")]
    keys = adapter_keys(names, folder)
    tensors = load_distributed(folder, list(keys))
    optimizer_state: dict[str, Tensor] = {}
    if optimizer.is_dir() and tensors:
        names = [name for name in distributed_keys(optimizer) if name.startswith(OPTIMIZER_PREFIX)]
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_distributed(optimizer, names).items():
            parameter, _, state = name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")
            states.setdefault(parameter, {})[state] = tensor
        optimizer_state = by_name(states)
    return ImportedCheckpoint(folder, form, *_renamed(tensors, keys), optimizer_state=optimizer_state)


def _full(source: Path) -> Path | None:
    return source / FULL if (source / FULL).is_file() else None


def _from_full(file: Path) -> ImportedCheckpoint:
    stored = _adapter_of(load_mapping(file), file)
    optimizer = file.with_name(FULL_OPTIMIZER)
    optimizer_state: dict[str, Tensor] = {}
    if optimizer.is_file():
        optimizer_state = by_name(mapping(load_mapping(optimizer).get("state"), optimizer, "state"))
    return ImportedCheckpoint(file.parent, "FSDP, in one file", *stored, optimizer_state=optimizer_state)


def _local_shards(source: Path) -> Path | None:
    return next(iter(sorted(source.glob("pytorch_model_fsdp*_rank*.bin"))), None)


def _refuse_local_shards(file: Path) -> ImportedCheckpoint:
    raise CheckpointError(
        f"{file}: holds one rank's piece without its place (LOCAL_STATE_DICT, or use_dcp=False); load it with the "
        "same number of processes and save SHARDED_STATE_DICT"
    )


def _from_zero_state(source: Path, state: ZeroState) -> ImportedCheckpoint:
    keys = adapter_keys(list(state.weights), source)
    optimizer_state = {}
    for name, tensor in state.optimizer_state.items():
        parameter, _, kind = name.rpartition(".")
        optimizer_state[f"{parameter_name(adapter_key(parameter)[0])}.{kind}"] = tensor
    return ImportedCheckpoint(
        source, state.form, *_renamed(state.weights, keys), optimizer_state=optimizer_state, step=state.step
    )


def _adapter_folder(source: Path) -> Path | None:
    names = (ADAPTER_WEIGHTS, "adapter_model.bin", ADAPTER_CONFIG)
    return source if any((source / name).is_file() for name in names) else None


def _from_adapter(folder: Path) -> ImportedCheckpoint:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        file = folder / "adapter_model.bin"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; copy the folder again"
        )
    stored = _adapter_of(_load_any(file), file)
    if (folder / MANIFEST).is_file() and (folder / OPTIMIZER_FILE).is_file():
        return ImportedCheckpoint(
            folder, "checkpoint of samestep", *stored, optimizer_state=read_tensors(folder / OPTIMIZER_FILE)
        )
    optimizer = folder / NUMBERED_OPTIMIZER
    if not optimizer.is_file():
        return ImportedCheckpoint(folder, "PEFT adapter", *stored)
    return ImportedCheckpoint(
        folder,
        "transformers Trainer (DDP or one process)",
        *stored,
        optimizer_state=by_index(load_mapping(optimizer), stored[0]),
    )


def _weights(source: Path) -> Path | None:
    return next((source / name for name in _WEIGHTS if (source / name).is_file()), None)


def _from_weights_folder(file: Path) -> ImportedCheckpoint:
    if file.suffix != ".json":
        return _from_weights(file.parent, [file])
    names = sorted(set(read_weight_map(file).values()))
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise CheckpointError(
            f"{file.parent}: {len(missing)} of {len(names)} weight files are missing "
            f"({printable(', '.join(missing))}); copy them again"
        )
    return _from_weights(file.parent, [file.parent / name for name in names])


def _from_weights(source: Path, files: list[Path]) -> ImportedCheckpoint:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _load_any(file)
    imported = _adapter_of(tensors, source)
    if not any(is_lora(key) for key in imported[0]):
        raise CheckpointError(
            f"{source}: a model without a LoRA ({len(tensors)} tensors); give an adapter or a checkpoint of one"
        )
    return ImportedCheckpoint(
        source, "weights alone (`accelerate merge-weights`, `zero_to_fp32.py`)", *imported
    )


_FORMS: tuple[tuple[Callable[[Path], Path | None], Callable[[Path], ImportedCheckpoint]], ...] = (
    (_shards, _from_shards),
    (zero_folder, lambda folder: _from_zero_state(folder, read_zero(folder))),
    (universal_folder, lambda folder: _from_zero_state(folder, read_universal(folder))),
    (_distributed, _from_distributed),
    (_full, _from_full),
    (_local_shards, _refuse_local_shards),
    (_adapter_folder, _from_adapter),
    (_weights, _from_weights_folder),
)


# Around them -----------------------------------------------------------------------------


def _load_any(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return load_mapping(file)
    read_shard(file)  # refuses a file that is cut short, with the sizes
    return read_tensors(file)


def _adapter_of(stored: Mapping[str, Tensor], where: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {
        key: value for key, value in stored.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    return _renamed(tensors, adapter_keys(list(tensors), where))


def _renamed(
    stored: Mapping[str, Tensor], keys: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by their keys in an adapter file, and the keys they had."""
    return {key: stored[raw].detach() for raw, key in keys.items()}, {key: raw for raw, key in keys.items()}


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
