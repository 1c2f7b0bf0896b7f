"""The forms of a checkpoint: how each is known by the files that lie there, and how it is read on one CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from launch.checkpoints.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launch.checkpoints.manifest import MANIFEST, OPTIMIZER_FILE, SHARDS
from launch.errors import CheckpointError
from launch.untrusted_files import printable
from trainer.formats.dcp import distributed_keys, load_distributed
from trainer.formats.deepspeed import ZeroState, read_universal, read_zero, universal_folder, zero_folder
from trainer.formats.imported import ImportedCheckpoint
from trainer.formats.key_names import adapter_key, adapter_keys, is_lora, parameter_name
from trainer.formats.optimizer_state import by_index, by_name
from trainer.formats.safetensors_blocks import read_shard, read_weight_map
from trainer.formats.torch_files import load_mapping, mapping
from trainer.formats.validated import read_tensors

DISTRIBUTED, DISTRIBUTED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
FULL, FULL_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
OPTIMIZER_PREFIX = "optimizer.state."
NUMBERED_OPTIMIZER = "optimizer.pt"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def shards_of(source: Path) -> Path | None:
    """The folder with every rank's part in a sharded checkpoint of ours; None in any other."""
    return source / SHARDS if (source / SHARDS).is_dir() else None


def from_shards(folder: Path) -> ImportedCheckpoint:
    """Read what the ranks of a sharded checkpoint of ours wrote, by torch's DCP or by DeepSpeed."""
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


def from_adapter(folder: Path) -> ImportedCheckpoint:
    """Read an adapter's folder, with the optimizer state of ours or of transformers' Trainer where it lies there."""
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
        return from_weights(file.parent, [file])
    names = sorted(set(read_weight_map(file).values()))
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise CheckpointError(
            f"{file.parent}: {len(missing)} of {len(names)} weight files are missing "
            f"({printable(', '.join(missing))}); copy them again"
        )
    return from_weights(file.parent, [file.parent / name for name in names])


def from_weights(source: Path, files: list[Path]) -> ImportedCheckpoint:
    """Read the adapter out of the weights of a whole model. CheckpointError when there is none in them."""
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


CHECKPOINT_FORMS: tuple[tuple[Callable[[Path], Path | None], Callable[[Path], ImportedCheckpoint]], ...] = (
    (shards_of, from_shards),
    (zero_folder, lambda folder: _from_zero_state(folder, read_zero(folder))),
    (universal_folder, lambda folder: _from_zero_state(folder, read_universal(folder))),
    (_distributed, _from_distributed),
    (_full, _from_full),
    (_local_shards, _refuse_local_shards),
    (_adapter_folder, from_adapter),
    (_weights, _from_weights_folder),
)


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
