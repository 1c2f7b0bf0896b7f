"""Which values of a recipe make a run the same run: those that alter its numbers, and a digest of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe

_LATER: dict[str, Any] = {
    "data.format": "auto",
    "data.columns": None,
    "data.chat_template": None,
    "evaluation.metrics": "auto",
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "lora.rank_pattern": {},
    "lora.alpha_pattern": {},
}
"""Keys that recipes of older versions do not have, with the values that mean what those versions did."""


_PRODUCTS = {"fp8": "fp8, the first layers in bf16"}
"""What a value means where older versions computed other numbers under its name: checkpoints of theirs say `fp8`."""


def later_values(recipe: Recipe) -> set[str]:
    """Dotted keys that say nothing an older version did not mean: no fingerprint counts them."""
    return {
        key
        for key, value in _LATER.items()
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
        harmless.add("model.products")  # as in the runs of before there was a choice
    flat["model.products"] = _PRODUCTS.get(recipe.model.products, recipe.model.products)
    sections = ("model.", "quantization.", "lora.", "data.", "batch.", "training.")
    return {key: value for key, value in flat.items() if key.startswith(sections) and key not in harmless}


def recipe_fingerprint(recipe: Recipe) -> str:
    """sha256 of the altering values as the recipe has them, hexadecimal: the same in every version."""
    values = altering_values(recipe)
    if "model.products" in values:
        values["model.products"] = recipe.model.products
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
