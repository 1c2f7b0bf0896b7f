"""The one form into which every checkpoint is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


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
