"""Which decoder layers `model.products: fp8` computes in 8 bits."""

from __future__ import annotations

_KEPT = 4
_SHARE = 7


def layers_in_bf16(layers: int) -> int:
    """Return how many of a model's decoder layers, from the first on, `fp8` leaves in the dtype of the activations.

    Four, and at most a seventh of all. What a layer rounds away is an error in the input of all layers after it, and a
    hidden state consists of the outputs of few layers there, so that the error is a large share of it. Megatron-Core
    has a setting for this too (`first_last_layers_bf16`). docs/performance.md has the losses with and without.
    """
    return min(_KEPT, layers // _SHARE)
