"""Triton kernels for a row that holds the prefix of several samples once (`trainer.model.attention.SharedPrefix`).

Between the products of queries, keys and values and their attention: rotary positions as Liger 0.8.5 turns them (its
`_triton_rope`, the same arithmetic in the same dtype), and of a row the whole samples in the same pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.attention import SharedPrefix
from trainer.model.kernel_launch import DirectLaunch, next_power_of_2


@triton.jit
def _turned(first, second, cosine, sine, BACK: tl.constexpr):
    """Both halves of heads, turned by their positions, or turned back."""
    first, second = first.to(sine.dtype), second.to(sine.dtype)
    if BACK:
        return first * cosine + second * sine, second * cosine - first * sine
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _halves(heads, width, H: tl.constexpr, D: tl.constexpr):
    """Offsets [H, D] of the first halves of a token's heads, and which of them are there."""
    head, half = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    return head * width + half, (head < heads) & (half < width // 2)


@DirectLaunch
@triton.jit
def _whole(
    query, key, value, cos, sin, rows, whole_query, whole_key, whole_value,
    heads, key_heads, width, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A token of the whole samples [A] from its place in the row: query and key turned, value as it is."""
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place)
    half = tl.arange(0, D)
    cosine = tl.load(cos + row * width + half, mask=half < width // 2, other=0.0)[None, :]
    sine = tl.load(sin + row * width + half, mask=half < width // 2, other=0.0)[None, :]
    at, inside = _halves(heads, width, H, D)
    source, target = query + row * heads * width + at, whole_query + place * heads * width + at
    first, second = tl.load(source, mask=inside), tl.load(source + width // 2, mask=inside)
    first, second = _turned(first, second, cosine, sine, False)
    tl.store(target, first, mask=inside)
    tl.store(target + width // 2, second, mask=inside)
    at, inside = _halves(key_heads, width, K, D)
    source, target = key + row * key_heads * width + at, whole_key + place * key_heads * width + at
    first, second = tl.load(source, mask=inside), tl.load(source + width // 2, mask=inside)
    first, second = _turned(first, second, cosine, sine, False)
    tl.store(target, first, mask=inside)
    tl.store(target + width // 2, second, mask=inside)
    source, target = value + row * key_heads * width + at, whole_value + place * key_heads * width + at
    tl.store(target, tl.load(source, mask=inside), mask=inside)
    tl.store(target + width // 2, tl.load(source + width // 2, mask=inside), mask=inside)


@triton.jit
def _sum(gradient, place, row, starts, copies, length, at, inside, size):
    """fp32: the gradient of a token of the row; of a prefix the sum over all samples, one after the other."""
    total = tl.load(gradient + place * size + at, mask=inside, other=0.0).to(tl.float32)
    if row < length:
        for number in range(1, copies):
            other = tl.load(starts + number) + row
            total += tl.load(gradient + other * size + at, mask=inside, other=0.0).to(tl.float32)
    return total


@DirectLaunch
@triton.jit(do_not_specialize=["copies"])
def _whole_gradient(
    whole_query, whole_key, whole_value, cos, sin, places, starts, copies, length, query, key, value,
    heads, key_heads, width, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The gradients at a token of the row [T] from those at the whole samples: query and key turned back.

    Of a prefix's queries only the first copy has a gradient: the outputs of the others are not read.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row)
    half = tl.arange(0, D)
    cosine = tl.load(cos + row * width + half, mask=half < width // 2, other=0.0)[None, :]
    sine = tl.load(sin + row * width + half, mask=half < width // 2, other=0.0)[None, :]
    dtype = query.dtype.element_ty
    at, inside = _halves(heads, width, H, D)
    source, target = whole_query + place * heads * width + at, query + row * heads * width + at
    first, second = tl.load(source, mask=inside), tl.load(source + width // 2, mask=inside)
    first, second = _turned(first, second, cosine, sine, True)
    tl.store(target, first, mask=inside)
    tl.store(target + width // 2, second, mask=inside)
    at, inside = _halves(key_heads, width, K, D)
    size, later = key_heads * width, at + width // 2
    first = _sum(whole_key, place, row, starts, copies, length, at, inside, size).to(dtype)
    second = _sum(whole_key, place, row, starts, copies, length, later, inside, size).to(dtype)
    first, second = _turned(first, second, cosine, sine, True)
    tl.store(key + row * size + at, first, mask=inside)
    tl.store(key + row * size + later, second, mask=inside)
    for half_at in tl.static_range(2):
        where = at + half_at * (width // 2)
        total = _sum(whole_value, place, row, starts, copies, length, where, inside, size)
        tl.store(value + row * size + where, total.to(dtype), mask=inside)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, width: int, shared: Any
    ) -> tuple[Tensor, ...]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.shared, ctx.shapes = shared, [each.shape for each in (query, key, value)]
        given = [each.contiguous() for each in (query, key, value)]
        counts = [each.numel() // (each.shape[1] * width) for each in given]
        whole = [
            each.new_empty(len(shared.rows), count, width) for each, count in zip(given, counts, strict=True)
        ]
        sizes = _sizes(counts[0], counts[1], width)
        _whole[(len(shared.rows),)](*given, cos, sin, shared.rows, *whole, *sizes)
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        shared = ctx.shared
        given = [each.contiguous() for each in gradients]
        of_row = [each.new_empty(shape) for each, shape in zip(given, ctx.shapes, strict=True)]
        _, heads, width = given[0].shape
        places = shared.places, shared.starts, len(shared.starts), shared.length
        sizes = _sizes(heads, given[1].shape[1], width)
        _whole_gradient[(len(shared.places),)](*given, cos, sin, *places, *of_row, *sizes)
        return *of_row, None, None, None, None


def _sizes(heads: int, key_heads: int, width: int) -> tuple[int, ...]:
    """The last arguments of both kernels."""
    return heads, key_heads, width, *map(next_power_of_2, (heads, key_heads, width // 2))


def turn_whole(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, width: int, shared: SharedPrefix
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query and key turned by their rotary positions, and value, of the whole samples: [A, heads, width] each.

    query [1, T, heads * width] or [1, T, heads, width], key and value likewise with kv_heads; cos and sin
    [1, T, width], whose halves are equal. Nothing is written over. The gradients of a prefix's copies are added in
    fp32, in the order of the samples.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _Turned.apply(query, key, value, cos, sin, width, shared))
