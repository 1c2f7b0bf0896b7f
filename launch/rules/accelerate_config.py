"""What an accelerate configuration asks for, as far as it could change what is trained: read from files or a launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.resources import resource
from launch.strategies import STRATEGIES, default_strategy
from launch.untrusted_files import parse_json, parse_yaml, read_text, reason_of


@dataclass(frozen=True)
class LaunchConfig:
    """`where`: the file, or the launch. `fsdp`, `deepspeed`: empty for strategies without them; values as written."""

    where: str
    mixed_precision: str = "no"
    fsdp: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    multinode_launcher: str = "standard"

    def fsdp_flag(self, key: str) -> bool:
        """Read a switch of FSDP's: `true` in YAML and in the environment."""
        return str(self.fsdp.get(key, False)).lower() in ("true", "1", "yes")


def shipped_config(strategy: str) -> LaunchConfig:
    """Read the file of a strategy in accelerate_configs/, which somebody may have edited.

    Raises ConfigError when it, or the DeepSpeed file that it names, cannot be read.
    """
    file = resource("accelerate_configs", STRATEGIES[strategy].config_file)
    values = _read(file, parse_yaml)
    deepspeed, fsdp = (_section(file, values, key) for key in ("deepspeed_config", "fsdp_config"))
    zero: Mapping[str, Any] = {}
    if name := deepspeed.get("deepspeed_config_file"):
        zero = {"zero_optimization": {}} | _read(resource("ds_configs", Path(str(name)).name), parse_json)
    return LaunchConfig(
        str(file),
        str(values.get("mixed_precision", "no")),
        fsdp,
        zero,
        str(deepspeed.get("deepspeed_multinode_launcher", "pdsh" if deepspeed else "standard")),
    )


def launched_config(environment: Mapping[str, str]) -> LaunchConfig:
    """Read that of a launch under way: what `accelerate launch` (1.15) has put into the environment of its processes.

    Raises ConfigError when the DeepSpeed file cannot be read.
    """
    fsdp = {}
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        fsdp = {name.lower(): value for name, value in environment.items() if name.startswith("FSDP_")}
    zero: Mapping[str, Any] = {}
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if not file:
            raise ConfigError(
                "deepspeed_config_file: the accelerate config names none; "
                "use accelerate_configs/zero2.yaml or zero3.yaml"
            )
        zero = {"zero_optimization": {}} | _read(Path(file), parse_json)  # an empty file is DeepSpeed's too
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    return LaunchConfig("the accelerate config of this launch", precision, fsdp, zero)


def launched_strategy(config: LaunchConfig, several: bool) -> str:
    """The strategy that a launch's configuration stands for; `several`: torchrun started it."""
    if config.deepspeed:
        zero = config.deepspeed.get("zero_optimization") or {}
        return f"zero{zero.get('stage', 0) if isinstance(zero, dict) else zero}"
    if config.fsdp:
        return "fsdp"
    return default_strategy(2 if several else 1).name


def _section(file: Path, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = values.get(key)
    if section is None or isinstance(section, dict):
        return section or {}
    raise ConfigError(
        f"{file}: {key} is no section ({section!r:.40}); correct it, or restore the shipped file"
    )


def _read(file: Path, parse: Any) -> dict[str, Any]:
    try:
        values = parse(read_text(file))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({reason_of(error)}); correct it, or restore the shipped file"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: is no mapping; correct it, or restore the shipped file")
    return values
