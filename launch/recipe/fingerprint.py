"""Which values of a recipe make a run the same run: those that alter its numbers, and a digest of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe

LATER: dict[str, Any] = {
    "data.format": "auto",
    "data.columns": None,
    "data.chat_template": None,
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "lora.rank_pattern": {},
    "lora.alpha_pattern": {},
    "model.products": "bf16",
    "model.num_layers_at_start_in_bf16": 0,
    "batch.prefix_sharing": False,
}
"""Keys that recipes of older versions do not have, with the values that mean what those versions did."""


def later_values(recipe: Recipe) -> set[str]:
    """Dotted keys that say nothing an older version did not mean: no fingerprint counts them."""
    return {
        key
        for key, value in LATER.items()
        if getattr(getattr(recipe, key.partition(".")[0]), key.partition(".")[2]) == value
    }


def altering_values(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of everything that alters the numbers of a run: equal values, same run."""
    values = recipe.model_dump(mode="json")
    flat = {
        f"{section}.{key}": value
        for section in values
        if isinstance(values[section], dict)
        for key, value in values[section].items()
    }
    harmless = {
        "data.on_bad_row",
        "data.vision_cache",
        "model.resident_weights",
        "batch.micro_batch_tokens",
        "training.logging_steps",
        "training.gradient_checkpointing",
        "training.dataloader_num_workers",
        "training.recheck",
    }
    harmless |= later_values(recipe)
    if (
        recipe.data.chat_template is not None
    ):  # where it lies is no matter: its content is part of the identity
        flat["data.chat_template"] = Path(recipe.data.chat_template).name
    if recipe.model.products == "bf16":
        harmless.add("model.num_layers_at_start_in_bf16")
    sections = ("model.", "quantization.", "lora.", "data.", "batch.", "training.")
    return {key: value for key, value in flat.items() if key.startswith(sections) and key not in harmless}


def recipe_fingerprint(recipe: Recipe) -> str:
    """sha256 of the altering values, hexadecimal."""
    return hashlib.sha256(json.dumps(altering_values(recipe), sort_keys=True).encode()).hexdigest()
