"""Triton kernels of a LoRA layer with sample dropout: masks are made where they are used and never stored.

A mask is `trainer.model.dropout.keep_mask`'s, to the bit: the same integer arithmetic on the same row keys and
channel words. Each kernel reads the activation once; the plain form makes, stores and applies the mask in six passes
over it. R is the rank of the adapter, padded with zeros to a power of 2 of at least 16, which `tl.dot` needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_RANK = 128
"""Above it the tiles of an adapter no longer fit beside those of the activation."""

_TOKENS, _CHANNELS = 64, 128  # of a tile
_SHARES = 16  # of the tokens in `adapter_gradient`, added up in a fixed order


@triton.jit
def _kept(rows, words, token, channel, inside, DROPPED: tl.constexpr):
    """bool [tokens, channels] of a tile: see `keep_mask`. Two channels share a word, the even one its low half."""
    factor = tl.load(rows + token * 2, mask=inside, other=0)
    addend = tl.load(rows + token * 2 + 1, mask=inside, other=0)
    word = tl.load(words + channel // 2)
    mixed = (factor[:, None] * word[None, :] + addend[:, None]).to(tl.uint32, bitcast=True)
    mixed ^= mixed >> 16
    mixed *= 0x7FEB352D
    mixed ^= mixed >> 16
    draw = tl.where((channel % 2 == 0)[None, :], mixed & 0xFFFF, mixed >> 16)
    return (draw ^ 0x8000) >= DROPPED  # the halves are compared as signed numbers there


# The number of tokens is another in every micro-batch: a kernel compiled anew for multiples of 16 would stop a step.
_any_length = triton.jit(do_not_specialize=["tokens"])


@_any_length
def _project(
    x,
    down,
    rows,
    words,
    out,
    tokens,
    channels,
    scale,
    DROPPED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """out [tokens, R] = dropout(x) [tokens, channels] @ down [R, channels].T"""
    token = tl.program_id(0) * T + tl.arange(0, T)
    rank = tl.arange(0, R)
    inside = token < tokens
    total = tl.zeros((T, R), dtype=tl.float32)
    for begin in range(0, channels, C):
        channel = begin + tl.arange(0, C)
        there = channel < channels
        at = token[:, None].to(tl.int64) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & there[None, :], other=0.0)
        if DROPPED > 0:
            kept = _kept(rows, words, token, tl.where(there, channel, 0), inside, DROPPED)
            tile = tl.where(kept, tile.to(tl.float32) * scale, 0.0).to(tile.dtype)
        matrix = tl.load(down + rank[:, None] * channels + channel[None, :], mask=there[None, :], other=0.0)
        total += tl.dot(tile, tl.trans(matrix))
    tl.store(out + token[:, None] * R + rank[None, :], total.to(out.dtype.element_ty), mask=inside[:, None])


@_any_length
def _add_back(
    gradient,
    down,
    rows,
    words,
    inner,
    tokens,
    channels,
    scale,
    DROPPED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """gradient [tokens, channels] += dropout's own factor * (inner [tokens, R] @ down [R, channels])"""
    token = tl.program_id(0) * T + tl.arange(0, T)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    inside, there = token < tokens, channel < channels
    left = tl.load(inner + token[:, None] * R + rank[None, :], mask=inside[:, None], other=0.0)
    right = tl.load(down + rank[:, None] * channels + channel[None, :], mask=there[None, :], other=0.0)
    change = tl.dot(left, right)
    if DROPPED > 0:
        kept = _kept(rows, words, token, tl.where(there, channel, 0), inside, DROPPED)
        change = tl.where(kept, change * scale, 0.0)
    at = gradient + token[:, None].to(tl.int64) * channels + channel[None, :]
    both = inside[:, None] & there[None, :]
    before = tl.load(at, mask=both, other=0.0)
    tl.store(at, (before.to(tl.float32) + change).to(before.dtype), mask=both)


@_any_length
def _gradient_of_down(
    x,
    rows,
    words,
    inner,
    out,
    tokens,
    channels,
    share,
    scale,
    DROPPED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """out [shares, R, channels]: inner [tokens, R].T @ dropout(x) [tokens, channels], of `share` tokens each"""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    rank = tl.arange(0, R)
    there = channel < channels
    total = tl.zeros((R, C), dtype=tl.float32)
    first = tl.program_id(1) * share
    for begin in range(first, first + share, T):
        token = begin + tl.arange(0, T)
        inside = token < tokens
        at = token[:, None].to(tl.int64) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & there[None, :], other=0.0)
        if DROPPED > 0:
            kept = _kept(rows, words, token, tl.where(there, channel, 0), inside, DROPPED)
            tile = tl.where(kept, tile.to(tl.float32) * scale, 0.0).to(tile.dtype)
        left = tl.load(inner + token[:, None] * R + rank[None, :], mask=inside[:, None], other=0.0)
        total += tl.dot(tl.trans(left), tile)
    at_rank = (tl.program_id(1) * R + rank)[:, None] * channels + channel[None, :]
    tl.store(out + at_rank, total, mask=there[None, :])


@triton.jit
def _quick_gelu(x, out, values, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    value = tl.load(x + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    tl.store(out + at, (wide * tl.sigmoid(1.702 * wide)).to(value.dtype), mask=inside)


def padded_rank(rank: int) -> int:
    """The R of the kernels for an adapter of rank `rank`."""
    return max(16, triton.next_power_of_2(rank))


def project(x: Tensor, down: Tensor, rows: Tensor, words: Tensor, dropped: int, scale: float) -> Tensor:
    """dropout(x) @ down.T: [T, R] in the dtype of x, from x [T, channels] and down [R, channels] of that dtype.

    `rows` int32 [T, 2] and `words` int32 [channels / 2] make the mask, `dropped` of 65536 draws are not kept, `scale`
    makes up for them. With `dropped` 0 nothing is read of the three.
    """
    tokens, channels = x.shape
    out = x.new_empty(tokens, down.shape[0])
    _project[(triton.cdiv(tokens, _TOKENS),)](
        x, down, rows, words, out, tokens, channels, scale, dropped, _TOKENS, _CHANNELS, down.shape[0]
    )
    return out


def add_back(
    gradient: Tensor, inner: Tensor, down: Tensor, rows: Tensor, words: Tensor, dropped: int, scale: float
) -> None:
    """Add what `project` passes back for `inner` [T, R] to `gradient` [T, channels], in place."""
    tokens, channels = gradient.shape
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(channels, _CHANNELS))
    rank = down.shape[0]
    _add_back[grid](
        gradient,
        down,
        rows,
        words,
        inner,
        tokens,
        channels,
        scale,
        dropped,
        _TOKENS,
        _CHANNELS,
        rank,
    )


def adapter_gradient(
    x: Tensor, inner: Tensor, rows: Tensor, words: Tensor, dropped: int, scale: float
) -> Tensor:
    """inner.T @ dropout(x): fp32 [R, channels], added up in the same order every time."""
    tokens, channels = x.shape
    rank = inner.shape[1]
    share = triton.cdiv(triton.cdiv(tokens, _SHARES), _TOKENS) * _TOKENS
    shares = triton.cdiv(tokens, share)
    out = torch.empty(shares, rank, channels, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(channels, _CHANNELS), shares)
    _gradient_of_down[grid](
        x, rows, words, inner, out, tokens, channels, share, scale, dropped, _TOKENS, _CHANNELS, rank
    )
    return out.sum(0)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), without a gradient."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _quick_gelu[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), 4096)
    return out
