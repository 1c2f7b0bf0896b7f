"""A PEFT adapter folder, read for merging: plain LoRA and rsLoRA pairs, all else refused by name."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from launch.errors import CheckpointError
from launch.manifest import MANIFEST, read_manifest
from trainer.checkpoint.shards import read_shard

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

# adapter_config.json: values that change nothing in the sum, and ways to begin that leave the base as it was.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Pair:
    """One LoRA pair. `module` is its name in the adapter; the change of the weight is scaling * b @ a."""

    module: str
    a: torch.Tensor  # fp32 [r, in]
    b: torch.Tensor  # fp32 [out, r]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight this pair belongs to."""
        return (self.b.shape[0], self.a.shape[1])

    def merged(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """`rows` (from row `begin` of the weight on) with the change added, in fp32."""
        return rows.float() + (self.b[begin : begin + len(rows)] @ self.a) * self.scaling


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter read into memory."""

    path: Path
    base: str | None
    revision: str | None
    pairs: tuple[Pair, ...]


def find_adapter(source: Path) -> Path:
    """The PEFT adapter folder of a run directory, a checkpoint or an adapter folder.

    Raises:
        CheckpointError: there is none, or the checkpoint is damaged.
    """
    source = source.expanduser()
    if (source / MANIFEST).is_file():  # one of our checkpoints: every file as it was published
        read_manifest(source, verify=True)
    for folder in (source, source / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            if not (folder / ADAPTER_WEIGHTS).is_file():
                raise CheckpointError(
                    f"{folder}: has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}; copy the folder again"
                )
            return folder
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such folder; give a run directory, a checkpoint or an adapter folder"
        )
    raise CheckpointError(
        f"{source}: no {ADAPTER_CONFIG} in it or in its adapter/; a run has one when it is done "
        "(`samestep run` finishes it), until then give one of its checkpoint-<step> folders"
    )


def read_adapter(folder: Path) -> Adapter:
    """Read and check a PEFT adapter folder. What would not be merged exactly is refused by its name."""
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    _refuse_unknown_methods(folder / ADAPTER_CONFIG, config)
    weights = folder / ADAPTER_WEIGHTS
    read_shard(weights)  # refuses a file that is cut short
    tensors = load_file(weights)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LORA_KEY.match(key)
        if match is None:
            raise CheckpointError(
                f"{weights}: {key} is neither lora_A nor lora_B of a linear layer; "
                "only plain LoRA pairs can be merged here, use PEFT's merge_and_unload for the rest"
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not sides:
        raise CheckpointError(
            f"{weights}: holds no tensors; the checkpoint was saved empty, take an earlier one"
        )
    pairs = tuple(_pair(weights, module, sides[module], config) for module in sorted(sides))
    silent = [pair.module for pair in pairs if not pair.a.any() or not pair.b.any()]
    if silent:
        raise CheckpointError(
            f"{weights}: {len(silent)} of {len(pairs)} lora pairs are zero ({', '.join(silent[:3])}); "
            "this adapter was not trained, merging it would change nothing"
        )
    return Adapter(folder, config.get("base_model_name_or_path"), config.get("revision"), pairs)


def _refuse_unknown_methods(file: Path, config: dict[str, Any]) -> None:
    refused = sorted(key for key, value in config.items() if value and key not in _WITHOUT_EFFECT | _READ)
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type: {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias: {config['bias']}")
    if config.get("init_lora_weights") not in _HARMLESS_STARTS:
        refused.append(f"init_lora_weights: {config['init_lora_weights']} (it changes the base)")
    if refused:
        raise CheckpointError(
            f"{file}: uses {', '.join(refused)}; only plain LoRA and rsLoRA can be merged here, "
            "use PEFT's merge_and_unload instead"
        )


def _pair(file: Path, module: str, sides: dict[str, torch.Tensor], config: dict[str, Any]) -> Pair:
    if set(sides) != {"A", "B"}:
        raise CheckpointError(
            f"{file}: {module} has lora_{''.join(sides)} only; the file is incomplete, copy it again"
        )
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(
            f"{file}: {module} is not a linear layer (lora_A {list(a.shape)}); use PEFT's merge_and_unload"
        )
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{file}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)} where "
            f"{ADAPTER_CONFIG} says rank {rank}; config and weights are of different adapters"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise CheckpointError(
            f"{file}: {module} holds infinite or undefined numbers; take an earlier checkpoint"
        )
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return Pair(module, a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern_value(pattern: dict[str, Any] | None, module: str, default: float) -> Any:
    """What PEFT 0.21 takes from a `rank_pattern` or `alpha_pattern`: the first key that ends the name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
