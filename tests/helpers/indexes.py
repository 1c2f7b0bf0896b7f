"""Prepared data without preparing: an index of made-up token counts, a recipe and a model's shape to go with it."""

from typing import Any

import numpy as np

from launch.inputs.dataset_index import Index, Split
from launch.inputs.families import shape_of
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.resources import resource

HUB_7B: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""config.json of Qwen2-VL-7B-Instruct, as on the hub."""

SHAPE = shape_of(HUB_7B)


def make_split(count: int, seed: int = 0, longest: int = 90) -> Split:
    """`count` samples of 20 to `longest` tokens, the longest among them."""
    random = np.random.default_rng(seed)
    text = random.integers(10, 30, count)
    visual = random.integers(10, longest - 29, count)
    if count:
        text[0], visual[0] = 30, longest - 30
    numbers = np.arange(count)
    return Split(numbers, text, visual, np.full(count, 2), numbers % 2)


def make_index(train: int = 330, longest: int = 90) -> Index:
    """An index whose training split has `train` samples."""
    from pathlib import Path

    splits = {
        "train": make_split(train, 0, longest),
        "validation": make_split(20, 1),
        "test": make_split(20, 2),
    }
    return Index(Path("nowhere"), "f" * 64, splits)  # type: ignore[arg-type]


def embedded_recipe(*overrides: str) -> Recipe:
    """The embedded recipe with a global batch of 32 and 3 epochs, whatever its tuning."""
    fixed = ("batch.global_batch_size=32", "training.num_train_epochs=3", "training.max_steps=-1")
    return load_recipe(
        resource("recipes", "embedded.yaml"), [*fixed, "training.warmup_steps=0.03", *overrides]
    )
