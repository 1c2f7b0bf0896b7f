"""The last decoder layer where its output is read: nobody reads the hidden states of tokens that predict no target.

Keys and values of all tokens are needed by the tokens that are read; queries, output projection, MLP and norm of the
others are not. The tokens read of a sample are those from its first scored one to its end, so that the causal mask of
variable-length kernels, which is aligned to the end of a sample, fits them as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.model.attention import Segments, attend

Linears = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]
"""The outputs of linear layers that are fed the same input."""


@dataclass(frozen=True)
class ReadTokens:
    """The tokens of a packed row whose last hidden state is read: a suffix of every sample.

    `positions`: where they lie in the row, int64 [S]; `segments`: how many of them each sample has.
    """

    positions: Tensor
    segments: Segments

    def among(self, scored_positions: Tensor) -> Tensor:
        """Return where tokens of the row lie among those read, [K]; all of them are read. Waits for no device."""
        return torch.searchsorted(self.positions, scored_positions)


class _Rows(torch.autograd.Function):
    """`x[:, positions]` of distinct positions; the gradient is written once, without an atomic addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.shape = x.shape
        return x.index_select(1, positions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.shape)
        return whole.index_copy_(1, positions, gradients[0]), None


def rows(x: Tensor, positions: Tensor) -> Tensor:
    """Return the rows `positions` [S], all different, of x [1, T, channels]: [1, S, channels]."""
    return cast(Tensor, _Rows.apply(x, positions))


def each_alone(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
    """Apply linear layers one by one, as they are."""
    return [module(x) for module in modules]


def compute_read_tokens_only(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Let the last decoder layer answer calls with `read` by `forward`, and its attention those with `queries`.

    Other calls, such as `generate`'s, go where they went. The attention is called as a module, so that the hooks on
    it see the call.
    """
    stock, stock_attention = layer.forward, cast(nn.Module, layer.self_attn).forward

    def of_layer(self: Any, hidden_states: Tensor, read: ReadTokens | None = None, **kwargs: Any) -> Any:
        if read is None:
            return stock(hidden_states, **kwargs)
        if self.gradient_checkpointing and self.training:
            again = partial(forward, self, read=read, **kwargs)
            return self._gradient_checkpointing_func(again, hidden_states)
        return forward(self, hidden_states, read=read, **kwargs)

    def of_attention(self: Any, *args: Any, queries: ReadTokens | None = None, **kwargs: Any) -> Any:
        if queries is None:
            return stock_attention(*args, **kwargs)
        return attention_of_queries(self, *args, queries=queries, **kwargs), None

    layer.forward = types.MethodType(of_layer, layer)  # type: ignore[method-assign]
    attention: Any = layer.self_attn
    attention.forward = types.MethodType(of_attention, attention)


def plain_layer(module: Any, hidden_states: Tensor, *, read: ReadTokens, **kwargs: Any) -> Tensor:
    """Compute `Qwen2VLDecoderLayer.forward` at the tokens read: [1, S, hidden] of [1, T, hidden]."""
    normed = module.input_layernorm(hidden_states)
    attended, _ = module.self_attn(normed, queries=read, **kwargs)
    hidden = rows(hidden_states, read.positions) + attended
    return cast(Tensor, hidden + module.mlp(module.post_attention_layernorm(hidden)))


def attention_of_queries(
    module: Any,
    hidden_states: Tensor,
    *,
    queries: ReadTokens,
    position_embeddings: tuple[Tensor, Tensor],
    segments: Segments,
    linears: Linears = each_alone,
    **_: Any,
) -> Tensor:
    """Compute `Qwen2VLAttention.forward` with the queries of some tokens alone: [1, S, hidden] of [1, T, hidden]."""
    (query,) = linears(rows(hidden_states, queries.positions), (module.q_proj,))
    key, value = linears(hidden_states, (module.k_proj, module.v_proj))
    query, key, value = (tensor.view(tensor.shape[1], -1, module.head_dim) for tensor in (query, key, value))
    if hasattr(module, "q_norm"):  # Qwen3-VL's, head by head
        query, key = module.q_norm(query), module.k_norm(key)
    cos, sin = (angles.squeeze(0)[:, None] for angles in position_embeddings)
    turned = _turn(query, cos[queries.positions], sin[queries.positions])
    key = _turn(key, cos, sin)
    if shared := segments.shared:
        key, value = shared.whole(key), shared.whole(value)
    output = attend(turned, key, value, segments, True, module.scaling, queries=queries.segments)
    (projected,) = linears(output.reshape(1, len(output), -1), (module.o_proj,))
    return projected


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_pos_emb` of transformers' Qwen2-VL on [tokens, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
