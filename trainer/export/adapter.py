"""A LoRA read for consolidating and merging: LoRA, rsLoRA, DoRA and modules saved whole; all else refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints.adapter_file import ADAPTER_CONFIG
from launch.errors import CheckpointError
from trainer.export.adapter_config import (
    Values,
    config_from_shapes,
    in_present_names,
    pattern_value,
    refuse_endless_patterns,
    refuse_unknown_methods,
    written_module,
)
from trainer.formats.detect import import_checkpoint
from trainer.formats.imported import ImportedCheckpoint
from trainer.formats.key_names import PREFIX, lora_part
from trainer.formats.validated import checked, read_json_object


@dataclass(frozen=True)
class AdapterOverrides:
    """What the command line says where a checkpoint has no adapter_config.json (FSDP writes none)."""

    adapter_config: Path | None = None
    lora_alpha: float | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class LoraPair:
    """One LoRA pair. `module` is its name in the adapter; the change of the weight is scaling * b @ a.

    With a `magnitude` (DoRA) every row of the sum is then brought to that length.
    """

    module: str
    a: torch.Tensor  # fp32 [r, in]
    b: torch.Tensor  # fp32 [out, r]
    scaling: float
    magnitude: torch.Tensor | None = None  # fp32 [out]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight this pair belongs to."""
        return (self.b.shape[0], self.a.shape[1])

    def merged(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """`rows` (from row `begin` of the weight on) with the change added, in fp32."""
        changed = rows.float() + (self.b[begin : begin + len(rows)] @ self.a) * self.scaling
        if self.magnitude is None:
            return changed
        # peft 0.21, `DoraLinearVariant.merge_safe`: the length is that of the sum, row by row
        factor = self.magnitude[begin : begin + len(rows)] / torch.linalg.norm(changed, dim=1)
        return factor[:, None] * changed


@dataclass(frozen=True)
class Saved:
    """One tensor of `modules_to_save`: it takes the base tensor's place. `module` is its name in the adapter."""

    module: str
    parameter: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def merged(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """Return the rows that take the place of `rows` (from row `begin` on)."""
        whole = self.tensor.reshape(self.tensor.shape[0] if self.tensor.ndim else 1, -1)
        return whole[begin : begin + len(rows)]


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory. `tensors` and `config` are what its files hold in PEFT's present form."""

    path: Path
    form: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    pairs: tuple[LoraPair, ...]
    saved: tuple[Saved, ...]

    @property
    def base(self) -> str | None:
        """Return the base model that it names."""
        return self.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        return self.config.get("revision")

    @property
    def contents(self) -> dict[str, memoryview]:
        """Return the bytes of every tensor, as stored."""
        return {
            name: memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for name, tensor in self.tensors.items()
        }

    @property
    def silent(self) -> list[str]:
        """Modules whose pair changes nothing."""
        zero = [pair.module for pair in self.pairs if not pair.a.any() or not pair.b.any()]
        dora = {pair.module for pair in self.pairs if pair.magnitude is not None}
        return [module for module in zero if module not in dora]


def read_adapter(source: Path, missing: AdapterOverrides | None = None) -> Adapter:
    """Read and check the LoRA of a run directory, a checkpoint of any form, or an adapter folder.

    Raises:
        CheckpointError: it cannot be read whole, or uses what would not be merged exactly (by its name).
    """
    return adapter_of(import_checkpoint(source), missing or AdapterOverrides())


def adapter_of(imported: ImportedCheckpoint, missing: AdapterOverrides) -> Adapter:
    """Return the checked adapter of a checkpoint that was read."""
    config, file = _config_of(imported, missing)
    refuse_unknown_methods(file, config)
    checked(Values, config, file)
    modules = {part[0] for key in imported.tensors if (part := lora_part(key)) is not None}
    refuse_endless_patterns(file, config, modules | {written_module(imported, module) for module in modules})
    sides: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in imported.tensors.items():
        if (part := lora_part(key)) is None:
            rest[key] = tensor
        else:
            sides.setdefault(part[0], {})[part[1]] = tensor.float()
    if not sides:
        raise CheckpointError(f"{imported.source}: holds no lora_A and lora_B; give the folder of a LoRA")
    config = in_present_names(imported, config, list(sides))
    saved = _saved(imported.source, rest, config)
    pairs = tuple(_pair(imported.source, module, sides[module], config) for module in sorted(sides))
    return Adapter(imported.source, imported.form, config, imported.tensors, pairs, saved)


def refuse_untrained(adapter: Adapter) -> None:
    """CheckpointError when a pair is zero: merging it would change nothing, and that is never meant."""
    if silent := adapter.silent:
        raise CheckpointError(
            f"{adapter.path}: {len(silent)} of {len(adapter.pairs)} lora pairs are zero ({', '.join(silent[:3])}); "
            "this adapter was not trained, merging it would change nothing"
        )


# The configuration -----------------------------------------------------------------------


def _config_of(imported: ImportedCheckpoint, missing: AdapterOverrides) -> tuple[dict[str, Any], Path]:
    if missing.adapter_config is not None:
        place = missing.adapter_config.expanduser()
        file = place / ADAPTER_CONFIG if place.is_dir() else place
        config = read_json_object(file)
    elif imported.config is not None and imported.config_file is not None:
        file, config = imported.config_file, dict(imported.config)
    elif missing.lora_alpha is not None:
        file, config = imported.source, config_from_shapes(imported, missing.lora_alpha)
    else:
        raise CheckpointError(
            f"{imported.source}: has no {ADAPTER_CONFIG}, and its tensors do not tell lora_alpha ({imported.form}); "
            f"give the file with --adapter-config, or what the training had: --lora-alpha N (with --base-model)"
        )
    if missing.base_model is not None:
        config |= {"base_model_name_or_path": missing.base_model, "revision": None}
    return config, file


# The tensors -----------------------------------------------------------------------------


def _saved(source: Path, rest: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> tuple[Saved, ...]:
    module_names = list(config.get("modules_to_save") or [])
    saved, unknown = [], []
    for key, tensor in rest.items():
        module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        if any(_belongs(module, name) for name in module_names):
            saved.append(Saved(module, parameter, tensor))
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{source}: {unknown[0]} is neither lora_A nor lora_B of a linear layer, nor of a module in "
            f"modules_to_save ({len(unknown)} such tensors); use PEFT's merge_and_unload"
        )
    gone = [name for name in module_names if not any(_belongs(s.module, name) for s in saved)]
    if gone:
        raise CheckpointError(
            f"{source}: modules_to_save names {', '.join(gone)}, of which no tensor is there; copy the checkpoint again"
        )
    if broken := [f"{s.module}.{s.parameter}" for s in saved if not s.tensor.isfinite().all()]:
        raise CheckpointError(
            f"{source}: {broken[0]} holds infinite or undefined numbers; take an earlier checkpoint"
        )
    return tuple(saved)


def _belongs(module: str, name: str) -> bool:
    """Return whether PEFT 0.21 saves a module, or one around it, whole for `name`: the ends of names count."""
    parts = module.split(".")
    return any(".".join(parts[: number + 1]).endswith(name) for number in range(len(parts)))


def _pair(
    source: Path, module: str, sides: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> LoraPair:
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if set(sides) != needed:
        raise CheckpointError(
            f"{source}: {module} has {' and '.join(sorted(sides))} only where {' and '.join(sorted(needed))} are "
            f"needed; the file is incomplete or {ADAPTER_CONFIG} is of another adapter, copy it again"
            if set(sides) < needed
            else f"{source}: {module} has {', '.join(sorted(set(sides) - needed))}, which {ADAPTER_CONFIG} does not "
            "name; config and weights are of different adapters"
        )
    a, b, magnitude = sides["lora_A"], sides["lora_B"], sides.get("lora_magnitude_vector")
    if a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(
            f"{source}: {module} is not a linear layer (lora_A {list(a.shape)}); use PEFT's merge_and_unload"
        )
    rank = pattern_value(config.get("rank_pattern"), module, config["r"])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{source}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)} where {ADAPTER_CONFIG} says "
            f"rank {rank}; config and weights are of different adapters, or only one rank's slice was saved "
            "(FSDP with FULL_STATE_DICT before accelerate 1.15)"
        )
    if magnitude is not None and magnitude.numel() != b.shape[0]:
        raise CheckpointError(
            f"{source}: {module} has {magnitude.numel()} magnitudes for {b.shape[0]} rows; copy the checkpoint again"
        )
    if not all(side.isfinite().all() for side in sides.values()):
        raise CheckpointError(
            f"{source}: {module} holds infinite or undefined numbers; take an earlier checkpoint"
        )
    alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraPair(module, a, b, scaling, None if magnitude is None else magnitude.view(-1))
