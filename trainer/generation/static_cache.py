"""Keys and values of many rows in buffers that never move, and the attention that reads them.

transformers' own `StaticCache` (5.23) writes all rows at one position, so that prompts must be padded to one length,
and its attention repeats keys and values for every query head. Here each row has its own next place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from trainer.model.attention import Segments, attention_implementation, packed_attention

NAME = "samestep_static_cache"
"""Of the attention, in transformers' registry."""


class StaticKeysValues:
    """Buffers [rows, kv_heads, length, head_dim] of each layer; stands where transformers' decoders take a `Cache`."""

    def __init__(self, config: Any, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        """`config`: the language model's."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, length, width)
        layers = range(config.num_hidden_layers)
        # Zeros: what is masked weighs nothing, but NaN times nothing is NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._rows = self._places = torch.empty(0)
        self._packed = False
        self.length = length

    def write_prompts(self, rows: Tensor, places: Tensor) -> StaticKeysValues:
        """Take next the keys and values of packed tokens, and put them at (rows, places), [T] each."""
        self._rows, self._places, self._packed = rows, places, True
        return self

    def write_token(self, rows: Tensor, places: Tensor) -> StaticKeysValues:
        """Take next those of one token of every row, and put them at (rows, places), [rows] each."""
        self._rows, self._places, self._packed = rows, places, False
        return self

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep key and value; return what the attention sees: packed prompts themselves, else the whole buffers.

        [1, kv_heads, T, head_dim] of packed prompts, [rows, kv_heads, 1, head_dim] of a token each.
        """
        buffers = self._keys[layer], self._values[layer]
        for buffer, new in zip(buffers, (key, value), strict=True):
            tokens = new[0].transpose(0, 1) if self._packed else new[:, :, 0]
            buffer[self._rows, :, self._places] = tokens.to(buffer.dtype)
        return (key, value) if self._packed else buffers


@contextmanager
def static_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the language model attend through `attend_to_cache` inside the block."""
    AttentionInterface.register(NAME, attend_to_cache)
    with attention_implementation(model.model.language_model, NAME):
        yield


def attend_to_cache(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    prompts: Segments | None = None,
    visible: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each of packed `prompts`, or from one token a row to what is `visible` of the buffers.

    `visible`: bool [rows, 1, 1, length]. The keyword is not `segments`: the fused attention of training takes that
    one for itself, and keeps nothing.
    """
    if prompts is not None:
        return packed_attention(module, query, key, value, None, scaling, segments=prompts)
    rows, heads, width = query.shape[0], query.shape[1], query.shape[3]
    # The query heads that share a head of keys stand as its queries, so that no key is repeated.
    folded = query.reshape(rows, key.shape[1], -1, width)
    keys, values = key.to(query.dtype), value.to(query.dtype)
    output = scaled_dot_product_attention(folded, keys, values, attn_mask=visible, scale=scaling)
    return output.reshape(rows, 1, heads, width), None
