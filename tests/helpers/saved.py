"""What autograd keeps of a decoder layer: counted, to hold the arithmetic of `launch.planning.activations` against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.model.attention import Segments
from trainer.model.dropout import ARGUMENT, DropoutKeys

TOKENS = 499  # no other size of a tiny model


def saved_bytes(model: Any, keys: DropoutKeys | None, device: torch.device) -> float:
    """Bytes a token that the last decoder layer of a prepared model in bfloat16 saves for its backward pass.

    Cosines and sines, which all layers share, and weights are left out.
    """
    language = model.get_base_model().model.language_model
    positions = torch.arange(TOKENS, device=device).expand(4, 1, TOKENS)
    hidden = torch.randn(1, TOKENS, language.config.hidden_size, device=device).bfloat16().requires_grad_()
    rotation = language.rotary_emb(hidden, positions[1:])
    segments = Segments(torch.tensor([0, TOKENS], dtype=torch.int32, device=device), (TOKENS,))
    shared = {tensor.untyped_storage().data_ptr() for tensor in rotation}
    found: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if TOKENS in tensor.shape and place not in shared:
            found[place] = (
                tensor.untyped_storage().nbytes(),
                tensor,
            )  # alive, so that no other takes its place
        return tensor

    arguments: dict[str, Any] = {"segments": segments}
    if keys is not None:
        arguments[ARGUMENT] = keys.of(
            0, torch.zeros(TOKENS, dtype=torch.int64, device=device), positions[0, 0]
        )
        shared.add(arguments[ARGUMENT].untyped_storage().data_ptr())
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16),
    ):
        language.layers[-1](hidden, position_embeddings=rotation, **arguments)
    return sum(size for size, _ in found.values()) / TOKENS
