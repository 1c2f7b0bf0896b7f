"""The options of `samestep merge` and `consolidate` that travel to the trainer's side, and the values they may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BaseKind = Literal["original", "dequantized"]
"""The base that an adapter is added to: its unquantized weights, or those rounded to 4 bits and back."""
StoredDtype = Literal["bfloat16", "float32"]
DtypeChoice = Literal["auto", StoredDtype]
"""`auto` keeps the base's."""


@dataclass(frozen=True)
class MergeOptions:
    """What `samestep merge` and `consolidate` pass on; None and empty where nothing was said."""

    base: str | None = None
    dtype: str | None = None
    recipe: str | None = None
    adapter_config: Path | None = None
    lora_alpha: float | None = None
    base_model: str | None = None
    allow: Sequence[str] = ()

    def flags(self, *names: str) -> list[str]:
        """The command line of those named that were given."""
        values = [(name, getattr(self, name)) for name in names]
        return [
            word
            for name, value in values
            if value is not None
            for word in (
                f"--{name.replace('_', '-')}",
                f"{value:g}" if isinstance(value, float) else str(value),
            )
        ]
