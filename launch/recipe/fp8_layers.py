"""Which decoder layers `model.products: fp8` computes in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.recipe.schema import ModelSection

_KEPT, _SHARE = 4, 7


def layers_in_8_bits(model: ModelSection, layers: int) -> range:
    """Return the numbers, from 0, of a model's decoder layers whose products are of 8 bits.

    The first layers stay as they are (`num_layers_at_start_in_bf16`, as Megatron-Core calls it). What a layer rounds
    away is an error in the input of all layers after it, and a hidden state consists of the outputs of few layers
    there, so that the error is a large share of it. docs/performance.md has the losses with and without.
    """
    if model.products != "fp8":
        return range(0)
    first = model.num_layers_at_start_in_bf16
    return range(min(_KEPT, layers // _SHARE) if first == "auto" else min(first, layers), layers)
