"""Variable-length attention for packed rows, registered with transformers for both towers.

Several samples lie end to end in one row; each token attends only within its own sample. On CUDA from compute
capability 8.0 and in half precision this is PyTorch's own kernel (`torch.nn.attention.varlen`), elsewhere a loop
over the samples with `scaled_dot_product_attention`. No flash-attn package is needed.

transformers calls with [1, heads, T, head_dim] and takes back [1, T, heads, head_dim]; in between everything is
[T, heads, head_dim], T the tokens of all samples. Keys and values may have fewer heads (grouped-query attention).

A forward repeats to the bit on one GPU, and a sample's output does not depend on the samples beside it but by rounding.
A backward of PyTorch's kernel sums the gradients of queries by atomics, in no fixed order, unless
`torch.use_deterministic_algorithms(True)` is on (`training.deterministic`; ATen's `attention_backward.cu`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

PACKED = "samestep_flash"
"""Name of the attention. transformers hands the vision tower's segments over in one call only to implementations
whose name contains "flash" (`is_flash_attention_requested`, 5.23); others get a call per image and a device sync."""


@dataclass(frozen=True)
class Segments:
    """Where the samples of a packed row begin and end.

    `cu_seqlens`: boundaries [N + 1], int32, on the device of the row; `lengths`: the same as N Python numbers, so
    that nothing has to be read back from the device. `shared`: the row holds a prefix of several samples once, and the
    boundaries are those of the whole samples.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    shared: SharedPrefix | None = None


@dataclass(frozen=True)
class SharedPrefix:
    """A row of T tokens that holds once what n of its samples begin with: their first P tokens, the first P of the row.

    Attention sees the samples whole, A tokens. `rows`: [A], where each of these lies in the row; `places`: [T], where
    each token of the row first lies among them; `starts`: [n], where the samples with the prefix begin there. int64, on
    the device of the row; `length` is P.
    """

    rows: Tensor
    places: Tensor
    starts: Tensor
    length: int

    def whole(self, x: Tensor) -> Tensor:
        """Return the tokens of the whole samples [A, ...] of x [T, ...]."""
        return cast(Tensor, _Whole.apply(x, self))

    def once(self, x: Tensor) -> Tensor:
        """Return x [A, ...] at the row's tokens: [T, ...]."""
        return cast(Tensor, _Once.apply(x, self))


class _Whole(torch.autograd.Function):
    """The gradients of a prefix are added in fp32, sample after sample: without atomics, so that they repeat."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrefix) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), shared = gradients, ctx.shared
        of_row = gradient.index_select(0, shared.places)
        copies = shared.starts[:, None] + torch.arange(shared.length, device=gradient.device)
        of_copies = gradient.index_select(0, copies.view(-1)).view(*copies.shape, *gradient.shape[1:])
        of_row[: shared.length] = of_copies.sum(0, dtype=torch.float32)
        return of_row, None


class _Once(torch.autograd.Function):
    """All copies of a prefix are the same; the first one has the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrefix) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), shared = gradients, ctx.shared
        of_whole = gradient.new_zeros(len(shared.rows), *gradient.shape[1:])
        return of_whole.index_copy_(0, shared.places, gradient), None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch both towers to packed attention, for good; generation needs transformers' own (`stock_attention`)."""
    AttentionInterface.register(PACKED, packed_attention)
    model.model.language_model.config._attn_implementation = PACKED
    model.model.visual.config._attn_implementation = PACKED


@contextmanager
def attention_implementation(part: Any, name: str) -> Iterator[None]:
    """Let a part of a model (`language_model`, `visual`) attend by the implementation of that name inside the block.

    `name`: as registered with transformers' `AttentionInterface`.
    """
    config = part.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a model with packed attention transformers' own (`sdpa`) inside the block, for `generate`."""
    towers = model.model
    with (
        attention_implementation(towers.language_model, "sdpa"),
        attention_implementation(towers.visual, "sdpa"),
    ):
        yield


@contextmanager
def packed_tower(model: PreTrainedModel) -> Iterator[None]:
    """Give the vision tower packed attention inside the block, whatever it had before."""
    AttentionInterface.register(PACKED, packed_attention)
    with attention_implementation(model.model.visual, PACKED):
        yield


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: Segments,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment, causally where the module is causal; the call that transformers makes.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim], of one dtype. Returns
    ([1, T, heads, head_dim], None): no attention weights. `attention_mask` and `dropout` are not read.
    """
    causal: bool = module.is_causal  # type: ignore[assignment]
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    shared = segments.shared
    if shared:
        q, k, v = (shared.whole(each) for each in (q, k, v))
    output = attend(q, k, v, segments, causal, scaling)
    return (shared.once(output) if shared else output)[None], None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    causal: bool,
    scale: float | None,
    queries: Segments | None = None,
) -> Tensor:
    """Attend within each segment through the kernel that the device has: [T, heads, head_dim], like q.

    k and v are [T, kv_heads, head_dim]; `scale` multiplies the scores, None: 1 / sqrt(head_dim). `queries`: where q has
    fewer tokens than k, the last ones of each segment, its own boundaries.
    """
    kernel = varlen if _has_varlen(q.device, q.dtype) else _loop
    return kernel(q, k, v, segments, causal, scale, queries)


def _loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    causal: bool,
    scale: float | None,
    queries: Segments | None = None,
) -> Tensor:
    """One call per segment, on any device and in any dtype; takes and returns what `attend` does."""
    lengths = (queries or segments).lengths, segments.lengths, segments.lengths
    tensors = zip((q, k, v), lengths, strict=True)
    parts = (tensor.transpose(0, 1).split(each, dim=1) for tensor, each in tensors)
    outputs = [
        scaled_dot_product_attention(
            q_part[None],
            k_part[None],
            v_part[None],
            attn_mask=_causal_mask(q_part, k_part) if queries and causal else None,
            is_causal=causal and not queries,
            scale=scale,
            enable_gqa=True,
        )[0]
        for q_part, k_part, v_part in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """What each of the last tokens of a segment sees, bool [queries, keys]."""
    shape = q.shape[1], k.shape[1]
    return torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    causal: bool,
    scale: float | None,
    queries: Segments | None = None,
) -> Tensor:
    """PyTorch's one kernel for all segments; takes and returns what `attend` does, in half precision on CUDA.

    Its causal mask is aligned to the ends of queries and keys, as FlashAttention's has been since 2.1.

    The signature of `varlen_attn` changed: torch 2.14 wants `enable_gqa` for fewer key than query heads; 2.11 has no
    such argument and takes them as they are, which its kernel has always understood.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "scale" in known:
        options["scale"] = scale
    elif scale is not None and scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)
    if q.shape[1] != k.shape[1] and "enable_gqa" in known:
        options["enable_gqa"] = True
    queries = queries or segments
    output = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        queries.cu_seqlens,
        segments.cu_seqlens,
        max(queries.lengths),
        max(segments.lengths),
        **options,
    )
    return cast(Tensor, output)


@cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """The kernel is FlashAttention's: half precision, compute capability 8.0 and up."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
