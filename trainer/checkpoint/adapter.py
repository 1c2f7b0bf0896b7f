"""A LoRA read for consolidating and merging: LoRA, rsLoRA, DoRA and modules saved whole; all else refused by name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import AfterValidator, Field, PositiveInt, field_validator

from launch.errors import CheckpointError
from launch.untrusted_files import printable
from trainer.bounded import trial
from trainer.checkpoint.foreign import ADAPTER_CONFIG, TakenOver, take_over
from trainer.checkpoint.names import PREFIX, lora_part
from trainer.checkpoint.reading import Layout, checked, read_json

# adapter_config.json: values that change nothing in the sum, and ways to begin that leave the base as it was.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern",
    "use_dora", "use_rslora",
}  # fmt: skip
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


def _plain_name(name: str) -> str:
    """PEFT 0.21 takes it for a pattern too, and writes names alone."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{printable(name)[:60]!r} is no name of a module")
    return name


_Name = Annotated[str, AfterValidator(_plain_name)]
_Pattern = Annotated[str, AfterValidator(_regular)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Values(Layout):
    """What adapter_config.json may say under the keys that are read, here and in `trainer.takeover`."""

    r: PositiveInt
    lora_alpha: _Number
    lora_dropout: _Number = 0.0
    rank_pattern: dict[_Pattern, PositiveInt] | None = None
    alpha_pattern: dict[_Pattern, _Number] | None = None
    modules_to_save: list[_Name] | None = None
    target_modules: Any = None
    exclude_modules: Any = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _names_modules(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _regular(value)
        if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError(f"neither a pattern nor a list of names: {value!r:.60}")


@dataclass(frozen=True)
class Missing:
    """What the command line says where a checkpoint has no adapter_config.json (FSDP writes none)."""

    adapter_config: Path | None = None
    lora_alpha: float | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class Pair:
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
        """The rows that take the place of `rows` (from row `begin` on)."""
        whole = self.tensor.reshape(self.tensor.shape[0] if self.tensor.ndim else 1, -1)
        return whole[begin : begin + len(rows)]


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory. `tensors` and `config` are what its files hold in PEFT's present form."""

    path: Path
    form: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    pairs: tuple[Pair, ...]
    saved: tuple[Saved, ...]

    @property
    def base(self) -> str | None:
        """The base model that it names."""
        return self.config.get("base_model_name_or_path")

    @property
    def revision(self) -> str | None:
        return self.config.get("revision")

    @property
    def contents(self) -> dict[str, memoryview]:
        """The bytes of every tensor, as stored."""
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


def read_adapter(source: Path, missing: Missing | None = None) -> Adapter:
    """Read and check the LoRA of a run directory, a checkpoint of any form, or an adapter folder.

    Raises:
        CheckpointError: it cannot be read whole, or uses what would not be merged exactly (by its name).
    """
    return adapter_of(take_over(source), missing or Missing())


def adapter_of(found: TakenOver, missing: Missing) -> Adapter:
    """The checked adapter of a checkpoint that was read."""
    config, file = _config_of(found, missing)
    _refuse_unknown_methods(file, config)
    checked(_Values, config, file)
    modules = {part[0] for key in found.tensors if (part := lora_part(key)) is not None}
    _refuse_endless_patterns(file, config, modules | {written_module(found, module) for module in modules})
    sides: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in found.tensors.items():
        if (part := lora_part(key)) is None:
            rest[key] = tensor
        else:
            sides.setdefault(part[0], {})[part[1]] = tensor.float()
    if not sides:
        raise CheckpointError(f"{found.source}: holds no lora_A and lora_B; give the folder of a LoRA")
    config = _in_present_names(found, config, list(sides))
    saved = _saved(found.source, rest, config)
    pairs = tuple(_pair(found.source, module, sides[module], config) for module in sorted(sides))
    return Adapter(found.source, found.form, config, found.tensors, pairs, saved)


def refuse_untrained(adapter: Adapter) -> None:
    """CheckpointError when a pair is zero: merging it would change nothing, and that is never meant."""
    if silent := adapter.silent:
        raise CheckpointError(
            f"{adapter.path}: {len(silent)} of {len(adapter.pairs)} lora pairs are zero ({', '.join(silent[:3])}); "
            "this adapter was not trained, merging it would change nothing"
        )


# The configuration -----------------------------------------------------------------------


def _config_of(found: TakenOver, missing: Missing) -> tuple[dict[str, Any], Path]:
    if missing.adapter_config is not None:
        given = missing.adapter_config.expanduser()
        file = given / ADAPTER_CONFIG if given.is_dir() else given
        config = read_json(file)
    elif found.config is not None and found.config_file is not None:
        file, config = found.config_file, dict(found.config)
    elif missing.lora_alpha is not None:
        file, config = found.source, _config_from_shapes(found, missing.lora_alpha)
    else:
        raise CheckpointError(
            f"{found.source}: has no {ADAPTER_CONFIG}, and its tensors do not tell lora_alpha ({found.form}); give "
            f"the file with --adapter-config, or what the training had: --lora-alpha N (with --base-model)"
        )
    if missing.base_model is not None:
        config |= {"base_model_name_or_path": missing.base_model, "revision": None}
    return config, file


def _config_from_shapes(found: TakenOver, lora_alpha: float) -> dict[str, Any]:
    """The configuration that the tensors' names and shapes tell, with PEFT's defaults for the rest."""
    parts = {key: part for key in found.tensors if (part := lora_part(key)) is not None}
    ranks = {module: found.tensors[key].shape[0] for key, (module, part) in parts.items() if part == "lora_A"}
    if not ranks:
        raise CheckpointError(f"{found.source}: holds no lora_A; give the folder of a LoRA")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    whole = {key.removeprefix(PREFIX).rpartition(".")[0] for key in found.tensors if key not in parts}
    config: dict[str, Any] = LoraConfig(
        r=rank,
        lora_alpha=int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        target_modules=sorted(ranks),
        rank_pattern={re.escape(module): own for module, own in ranks.items() if own != rank},
        modules_to_save=sorted(whole) or None,
        use_dora=any(part == "lora_magnitude_vector" for _, part in parts.values()),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    return _plain(config)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON holds it: sets as sorted lists, enumerations as their values."""

    def simple(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        return getattr(value, "value", value)

    return {key: simple(value) for key, value in config.items()}


def _in_present_names(found: TakenOver, config: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """Patterns and targets that name modules as an older version did, with the names of the present one.

    Every module keeps the rank and alpha that its old name had; PEFT would quietly give it the defaults.
    """
    old = {module: written_module(found, module) for module in modules}
    if all(module == before for module, before in old.items()):
        return config
    config = dict(config)
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = {
            m: _pattern_value(config.get(pattern), before, config[default]) for m, before in old.items()
        }
        config[pattern] = {re.escape(m): value for m, value in values.items() if value != config[default]}
    known = {key: config[key] for key in ("target_modules", "exclude_modules") if config.get(key)}
    chosen = LoraConfig(**known)
    if not all(check_target_module_exists(chosen, module) for module in modules):
        config |= {"target_modules": sorted(modules), "exclude_modules": None}
    return config


def written_module(found: TakenOver, module: str) -> str:
    """The module's name in the version that wrote the checkpoint."""
    for side in ("lora_A", "lora_B"):
        raw = found.written_as.get(f"{PREFIX}{module}.{side}.weight")
        if raw is not None:
            return raw.rpartition(f".{side}.")[0].rpartition(PREFIX)[2]
    return module


def _refuse_unknown_methods(file: Path, config: Mapping[str, Any]) -> None:
    refused = sorted(key for key, value in config.items() if value and key not in _WITHOUT_EFFECT | _READ)
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type: {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias: {config['bias']}")
    if config.get("init_lora_weights") not in _HARMLESS_STARTS:
        refused.append(f"init_lora_weights: {config['init_lora_weights']} (it changes the base)")
    if refused:
        raise CheckpointError(
            f"{file}: uses {', '.join(refused)}; LoRA, rsLoRA and DoRA of linear layers and modules_to_save "
            "can be merged here, use PEFT's merge_and_unload instead"
        )


def _refuse_endless_patterns(file: Path, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """CheckpointError when the patterns of an adapter take too long on these names: any regular expression may stand.

    PEFT 0.21 matches all of them against every module, and nothing interrupts Python's `re`.
    """
    keys = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save")
    chosen = {key: config[key] for key in keys if config.get(key)}

    def match() -> None:
        targets = LoraConfig(**chosen)
        for module in modules:
            for pattern in ("rank_pattern", "alpha_pattern"):
                _pattern_value(config.get(pattern), module, 0)
            if "target_modules" in chosen:
                check_target_module_exists(targets, module)

    patterned = any(isinstance(value, str) for value in chosen.values()) or "layers_pattern" in chosen
    if not (patterned or config.get("rank_pattern") or config.get("alpha_pattern")):
        return
    if problem := trial(match):
        raise CheckpointError(
            f"{printable(str(file))}: its patterns of modules cannot be used ({printable(problem)}); name the modules "
            "instead"
        )


# The tensors -----------------------------------------------------------------------------


def _saved(source: Path, rest: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> tuple[Saved, ...]:
    wanted = list(config.get("modules_to_save") or [])
    found, unknown = [], []
    for key, tensor in rest.items():
        module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        if any(_belongs(module, name) for name in wanted):
            found.append(Saved(module, parameter, tensor))
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{source}: {unknown[0]} is neither lora_A nor lora_B of a linear layer, nor of a module in "
            f"modules_to_save ({len(unknown)} such tensors); use PEFT's merge_and_unload"
        )
    gone = [name for name in wanted if not any(_belongs(s.module, name) for s in found)]
    if gone:
        raise CheckpointError(
            f"{source}: modules_to_save names {', '.join(gone)}, of which no tensor is there; copy the checkpoint again"
        )
    if broken := [f"{s.module}.{s.parameter}" for s in found if not s.tensor.isfinite().all()]:
        raise CheckpointError(
            f"{source}: {broken[0]} holds infinite or undefined numbers; take an earlier checkpoint"
        )
    return tuple(found)


def _belongs(module: str, name: str) -> bool:
    """Whether a module is one that PEFT 0.21 saves whole for `name`, or lies in one: the ends of names count."""
    parts = module.split(".")
    return any(".".join(parts[: number + 1]).endswith(name) for number in range(len(parts)))


def _pair(source: Path, module: str, sides: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Pair:
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if set(sides) != wanted:
        raise CheckpointError(
            f"{source}: {module} has {' and '.join(sorted(sides))} only where {' and '.join(sorted(wanted))} are "
            f"needed; the file is incomplete or {ADAPTER_CONFIG} is of another adapter, copy it again"
            if set(sides) < wanted
            else f"{source}: {module} has {', '.join(sorted(set(sides) - wanted))}, which {ADAPTER_CONFIG} does not "
            "name; config and weights are of different adapters"
        )
    a, b, magnitude = sides["lora_A"], sides["lora_B"], sides.get("lora_magnitude_vector")
    if a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(
            f"{source}: {module} is not a linear layer (lora_A {list(a.shape)}); use PEFT's merge_and_unload"
        )
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
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
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Pair(module, a, b, scaling, None if magnitude is None else magnitude.view(-1))


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: float) -> Any:
    """What PEFT 0.21 takes from a `rank_pattern` or `alpha_pattern`: the first key that ends the name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
