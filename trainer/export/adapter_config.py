"""An adapter's adapter_config.json: what of it is read, what is refused, and what stands in where there is none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import AfterValidator, Field, PositiveInt, field_validator

from launch.errors import CheckpointError
from launch.untrusted_files import printable
from trainer.formats.imported import ImportedCheckpoint
from trainer.formats.key_names import PREFIX, lora_part
from trainer.formats.validated import FileSchema
from trainer.sandbox import trial

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


class Values(FileSchema):
    """What adapter_config.json may say under the keys that are read, here and in `trainer.import_checkpoint`."""

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


def config_from_shapes(imported: ImportedCheckpoint, lora_alpha: float) -> dict[str, Any]:
    """Return the configuration that the tensors' names and shapes tell, with PEFT's defaults for the rest."""
    parts = {key: part for key in imported.tensors if (part := lora_part(key)) is not None}
    ranks = {
        module: imported.tensors[key].shape[0] for key, (module, part) in parts.items() if part == "lora_A"
    }
    if not ranks:
        raise CheckpointError(f"{imported.source}: holds no lora_A; give the folder of a LoRA")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    whole = {key.removeprefix(PREFIX).rpartition(".")[0] for key in imported.tensors if key not in parts}
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


def in_present_names(
    imported: ImportedCheckpoint, config: dict[str, Any], modules: list[str]
) -> dict[str, Any]:
    """Patterns and targets that name modules as an older version did, with the names of the present one.

    Every module keeps the rank and alpha that its old name had; PEFT would quietly give it the defaults.
    """
    old = {module: written_module(imported, module) for module in modules}
    if all(module == before for module, before in old.items()):
        return config
    config = dict(config)
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = {m: pattern_value(config.get(pattern), before, config[default]) for m, before in old.items()}
        config[pattern] = {re.escape(m): value for m, value in values.items() if value != config[default]}
    known = {key: config[key] for key in ("target_modules", "exclude_modules") if config.get(key)}
    lora = LoraConfig(**known)
    if not all(check_target_module_exists(lora, module) for module in modules):
        config |= {"target_modules": sorted(modules), "exclude_modules": None}
    return config


def written_module(imported: ImportedCheckpoint, module: str) -> str:
    """Return the module's name in the version that wrote the checkpoint."""
    for side in ("lora_A", "lora_B"):
        raw = imported.written_as.get(f"{PREFIX}{module}.{side}.weight")
        if raw is not None:
            return raw.rpartition(f".{side}.")[0].rpartition(PREFIX)[2]
    return module


def refuse_unknown_methods(file: Path, config: Mapping[str, Any]) -> None:
    refused = sorted(key for key, value in config.items() if value and key not in _WITHOUT_EFFECT | _READ)
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type: {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias: {config['bias']}")
    if config.get("init_lora_weights") not in _HARMLESS_STARTS:
        refused.append(f"init_lora_weights: {config['init_lora_weights']} (it changes the base)")
    if refused:
        raise CheckpointError(
            f"{file}: uses {printable(', '.join(refused))[:500]}; LoRA, rsLoRA and DoRA of linear layers and "
            "modules_to_save can be merged here, use PEFT's merge_and_unload instead"
        )


def refuse_endless_patterns(file: Path, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """CheckpointError when the patterns of an adapter take too long on these names: any regular expression may stand.

    PEFT 0.21 matches all of them against every module, and nothing interrupts Python's `re`.
    """
    keys = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save")
    targeting = {key: config[key] for key in keys if config.get(key)}

    def match() -> None:
        targets = LoraConfig(**targeting)
        for module in modules:
            for pattern in ("rank_pattern", "alpha_pattern"):
                pattern_value(config.get(pattern), module, 0)
            if "target_modules" in targeting:
                check_target_module_exists(targets, module)

    patterned = any(isinstance(value, str) for value in targeting.values()) or "layers_pattern" in targeting
    if not (patterned or config.get("rank_pattern") or config.get("alpha_pattern")):
        return
    if problem := trial(match):
        raise CheckpointError(
            f"{printable(str(file))}: its patterns of modules cannot be used ({printable(problem)}); name the modules "
            "instead"
        )


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: float) -> Any:
    """Return what PEFT 0.21 takes from a `rank_pattern` or `alpha_pattern`: the first key that ends the name."""
    for key, value in (pattern or {}).items():
        if _ending(key).match(module):
            return value
    return default


@cache
def _ending(key: str) -> re.Pattern[str]:
    """Compiled once: `re` itself keeps 512, and an adapter may have a rank and an alpha for every module of a 72B."""
    return re.compile(rf"(.*\.)?({key})$")
