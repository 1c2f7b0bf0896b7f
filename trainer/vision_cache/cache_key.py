"""What makes an image's features what they are: the loaded tower, the image processor, the libraries between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
import xxhash
from torch import nn

from launch.recipe.schema import Recipe
from trainer.vision_cache.file import Kind

IMAGE_PACKAGES = ("pillow", "torchvision", "transformers")
"""They decode, resize and cut the images. What else computes (torch, kernels) changes the rounding alone."""

MEANING = {
    "tower": "another vision tower (weights or quantization)",
    "products": "another dtype of the products",
    "settings": "another configuration of the tower",
    "processor": "other processor settings",
    "packages": "other versions of the libraries that prepare images",
    "form": "another version of samestep",
}


def feature_facts(recipe: Recipe, tower: nn.Module, image_processor: Any) -> dict[str, Any]:
    """Everything that features depend on, as JSON holds it; `MEANING` says what a difference in each means.

    `tower`: as it was loaded and quantized, before anything is replaced in it.
    """
    settings = tower.config.to_dict()  # type: ignore[operator, union-attr]
    quantization = recipe.quantization
    facts = {
        "form": 2,  # 1: grey images of 16 bits were cut at 255
        "tower": tower_digest(tower),
        "products": quantization.bnb_4bit_compute_dtype if quantization.load_in_4bit else recipe.model.dtype,
        "settings": {name: value for name, value in settings.items() if not name.startswith(("_", "dtype"))},
        "processor": image_processor.to_dict(),
        "packages": {name: version(name) for name in IMAGE_PACKAGES},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts, sort_keys=True, default=str))
    return plain


def feature_kind(tower: Any, width: int, facts: Mapping[str, Any]) -> Kind:
    """The kind of features [V, width] that a tower makes, named by its facts."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()[:16]
    return Kind(key, tower.patch_embed.proj.weight.dtype, width, tower.config.spatial_merge_size)


@torch.no_grad()
def tower_digest(tower: nn.Module) -> str:
    """xxh3_128 (hexadecimal) of a tower's tensors: the packed bytes and quantization constants of 4-bit layers.

    How packed bytes are stored (uint8, float16) is a strategy's matter and does not count; on which device they lie
    neither. Of a 7B model 0.4 GB are read, a fraction of a second.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        content = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """In words, why features made under `theirs` are of no use here."""
    differing = [meaning for name, meaning in MEANING.items() if mine.get(name) != theirs.get(name)]
    return ", ".join(differing) or "settings that are unknown here"
