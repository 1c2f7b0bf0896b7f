"""Triton kernels: a LoRA layer with sample dropout, whose masks are made where they are used and never stored; what the
vision tower computes between its matrix products; the gradient of a norm.

A mask is `trainer.model.dropout.keep_mask`'s, to the bit: the same integer arithmetic on the same row keys and
channel words. Each kernel reads the activation once; the plain form makes, stores and applies the mask in six passes
over it. R is the rank of the adapter, filled up with zeros to a power of 2 of at least 16, which `tl.dot` needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2

LARGEST_RANK = 128
"""Above it the tiles of an adapter no longer fit beside those of the activation."""

_TOKENS, _CHANNELS = 64, 128  # of a tile
_SHARES = 16  # of the tokens in `adapter_gradient`, added up in a fixed order


@triton.jit
def _kept(rows, words, token, begin, channels, inside, DROPPED: tl.constexpr, C: tl.constexpr):
    """bool [tokens, C] of the tile of channels from `begin` on, which is even: see `keep_mask`.

    Two channels share a word, the even one its low half; it is mixed once for both.
    """
    factor = tl.load(rows + token * 2, mask=inside, other=0)
    addend = tl.load(rows + token * 2 + 1, mask=inside, other=0)
    place = begin // 2 + tl.arange(0, C // 2)
    word = tl.load(words + place, mask=place < (channels + 1) // 2, other=0)
    mixed = (factor[:, None] * word[None, :] + addend[:, None]).to(tl.uint32, bitcast=True)
    mixed ^= mixed >> 16
    mixed *= 0x7FEB352D
    mixed ^= mixed >> 16
    draw = tl.interleave(mixed & 0xFFFF, mixed >> 16)
    return (draw ^ 0x8000) >= DROPPED  # the halves are compared as signed numbers there


# The number of tokens is another in every micro-batch: a kernel compiled anew for multiples of 16 would stop a step.
_any_length = triton.jit(do_not_specialize=["tokens"])


@DirectLaunch
@_any_length
def _project(
    x,
    down,
    rows,
    words,
    out,
    tokens,
    channels,
    rank,
    scale,
    factor,
    DROPPED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """out [tokens, rank] = factor * dropout(x) [tokens, channels] @ down [rank, channels].T"""
    token = tl.program_id(0) * T + tl.arange(0, T)
    row = tl.arange(0, R)
    inside, real = token < tokens, row < rank
    total = tl.zeros((T, R), dtype=tl.float32)
    for begin in range(0, channels, C):
        channel = begin + tl.arange(0, C)
        there = channel < channels
        at = token[:, None].to(tl.int64) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & there[None, :], other=0.0)
        if DROPPED > 0:
            kept = _kept(rows, words, token, begin, channels, inside, DROPPED, C)
            tile = tl.where(kept, tile.to(tl.float32) * scale, 0.0).to(tile.dtype)
        at = row[:, None] * channels + channel[None, :]
        matrix = tl.load(down + at, mask=real[:, None] & there[None, :], other=0.0).to(tile.dtype)
        total += tl.dot(tile, tl.trans(matrix))
    at = token[:, None].to(tl.int64) * rank + row[None, :]
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@DirectLaunch
@_any_length
def _add_back(
    gradient,
    down,
    rows,
    words,
    inner,
    tokens,
    channels,
    rank,
    scale,
    factor,
    DROPPED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """gradient [tokens, channels] += factor * dropout's own * (inner [tokens, rank] @ down [rank, channels])"""
    token = tl.program_id(0) * T + tl.arange(0, T)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    row = tl.arange(0, R)
    inside, there, real = token < tokens, channel < channels, row < rank
    at = token[:, None].to(tl.int64) * rank + row[None, :]
    left = tl.load(inner + at, mask=inside[:, None] & real[None, :], other=0.0)
    at = row[:, None] * channels + channel[None, :]
    right = tl.load(down + at, mask=real[:, None] & there[None, :], other=0.0).to(left.dtype)
    change = tl.dot(left, right) * factor
    if DROPPED > 0:
        kept = _kept(rows, words, token, tl.program_id(1) * C, channels, inside, DROPPED, C)
        change = tl.where(kept, change * scale, 0.0)
    at = gradient + token[:, None].to(tl.int64) * channels + channel[None, :]
    both = inside[:, None] & there[None, :]
    before = tl.load(at, mask=both, other=0.0)
    tl.store(at, (before.to(tl.float32) + change).to(before.dtype), mask=both)


@DirectLaunch
@_any_length
def _gradient_of_down(
    x,
    rows,
    words,
    inner,
    out,
    tokens,
    channels,
    rank,
    share,
    scale,
    factor,
    DROPPED: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """out [shares, rank, channels]: factor * inner [tokens, rank].T @ dropout(x) [tokens, channels] of each share"""
    channel = tl.program_id(0) * C + tl.arange(0, C)
    row = tl.arange(0, R)
    there, real = channel < channels, row < rank
    total = tl.zeros((R, C), dtype=tl.float32)
    first = tl.program_id(1) * share
    for begin in range(first, first + share, T):
        token = begin + tl.arange(0, T)
        inside = token < tokens
        at = token[:, None].to(tl.int64) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & there[None, :], other=0.0)
        if DROPPED > 0:
            kept = _kept(rows, words, token, tl.program_id(0) * C, channels, inside, DROPPED, C)
            tile = tl.where(kept, tile.to(tl.float32) * scale, 0.0).to(tile.dtype)
        at = token[:, None].to(tl.int64) * rank + row[None, :]
        left = tl.load(inner + at, mask=inside[:, None] & real[None, :], other=0.0)
        total += tl.dot(tl.trans(left), tile)
    at = (tl.program_id(1) * rank + row)[:, None] * channels + channel[None, :]
    tl.store(out + at, total * factor, mask=real[:, None] & there[None, :])


@DirectLaunch
@triton.jit
def _quick_gelu(x, out, values, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    value = tl.load(x + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    tl.store(out + at, (wide * tl.sigmoid(1.702 * wide)).to(value.dtype), mask=inside)


@DirectLaunch
@triton.jit(do_not_specialize=["patches"])
def _rotate(qkv, cos, sin, out, patches, heads, width, H: tl.constexpr, D: tl.constexpr):
    """out [2, patches, heads, width] of qkv [patches, 3, heads, width]: q and k turned."""
    patch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, half = tl.arange(0, H), tl.arange(0, D)
    inside = (head < heads)[:, None] & (half < width // 2)[None, :]
    at = head[:, None] * width + half[None, :]
    row = qkv + (patch * 3 + part) * heads * width
    first = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + at + width // 2, mask=inside, other=0.0).to(tl.float32)
    angle = patch * width + half
    cosine = tl.load(cos + angle, mask=half < width // 2, other=0.0)[None, :]
    sine = tl.load(sin + angle, mask=half < width // 2, other=0.0)[None, :]
    turned = first * cosine - second * sine
    second = second * cosine + first * sine
    first = turned
    row = out + (part * patches + patch) * heads * width
    tl.store(row + at, first.to(out.dtype.element_ty), mask=inside)
    tl.store(row + at + width // 2, second.to(out.dtype.element_ty), mask=inside)


@DirectLaunch
@triton.jit
def _norm_gradient(gradient, residual, x, weight, deviations, channels, ADDED: tl.constexpr, C: tl.constexpr):
    """gradient [tokens, channels], of RMSNorm's output, becomes that of its input x, plus residual where ADDED."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, C)
    there = channel < channels
    at = token * channels + channel
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    scaled = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    deviation = tl.load(deviations + token)
    along = tl.sum(scaled * value, axis=0) * deviation * deviation / channels
    change = (scaled - value * along) * deviation
    if ADDED:
        change += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(gradient + at, change.to(gradient.dtype.element_ty), mask=there)


def _filled_up(rank: int) -> int:
    return max(16, next_power_of_2(rank))


def project(
    x: Tensor, down: Tensor, rows: Tensor, words: Tensor, dropped: int, scale: float, factor: float
) -> Tensor:
    """Return factor * dropout(x) @ down.T: [T, rank] in the dtype of x, from x [T, channels] and down [rank, channels].

    `rows` int32 [T, 2] and `words` int32 [channels / 2] make the mask, `dropped` of 65536 draws are not kept, `scale`
    makes up for them. With `dropped` 0 nothing is read of the three.
    """
    tokens, channels = x.shape
    rank = len(down)
    out = x.new_empty(tokens, rank)
    tiles = _TOKENS, _CHANNELS, _filled_up(rank)
    _project[(cdiv(tokens, _TOKENS),)](
        x, down, rows, words, out, tokens, channels, rank, scale, factor, dropped, *tiles
    )
    return out


def add_back(
    gradient: Tensor,
    inner: Tensor,
    down: Tensor,
    rows: Tensor,
    words: Tensor,
    dropped: int,
    scale: float,
    factor: float,
) -> None:
    """Add what `project` passes back for `inner` [T, rank] to `gradient` [T, channels], in place."""
    tokens, channels = gradient.shape
    rank = len(down)
    grid = (cdiv(tokens, _TOKENS), cdiv(channels, _CHANNELS))
    tiles = _TOKENS, _CHANNELS, _filled_up(rank)
    _add_back[grid](
        gradient, down, rows, words, inner, tokens, channels, rank, scale, factor, dropped, *tiles
    )


def adapter_gradient(
    x: Tensor, inner: Tensor, rows: Tensor, words: Tensor, dropped: int, scale: float, factor: float
) -> Tensor:
    """Return factor * inner.T @ dropout(x): fp32 [rank, channels], added up in the same order every time."""
    tokens, channels = x.shape
    rank = inner.shape[1]
    share = cdiv(cdiv(tokens, _SHARES), _TOKENS) * _TOKENS
    shares = cdiv(tokens, share)
    out = torch.empty(shares, rank, channels, dtype=torch.float32, device=x.device)
    grid = (cdiv(channels, _CHANNELS), shares)
    tiles = _TOKENS, _CHANNELS, _filled_up(rank)
    _gradient_of_down[grid](
        x, rows, words, inner, out, tokens, channels, rank, share, scale, factor, dropped, *tiles
    )
    return out.sum(0)


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), without a gradient."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _quick_gelu[(cdiv(x.numel(), 4096),)](x, out, x.numel(), 4096)
    return out


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v, each [patches, heads, width], of qkv [patches, 3, heads, width]; without a gradient.

    v is a view of qkv. q and k are turned as `apply_rotary_pos_emb_vision` turns them, in fp32 and rounded once; cos
    and sin are fp32 [patches, width], whose halves are equal.
    """
    patches, _, heads, width = qkv.shape
    qkv = qkv.contiguous()
    out = qkv.new_empty(2, patches, heads, width)
    tiles = next_power_of_2(heads), next_power_of_2(width // 2)
    _rotate[(patches, 2)](qkv, cos.contiguous(), sin.contiguous(), out, patches, heads, width, *tiles)
    query, key = out.unbind()
    return query, key, qkv[:, 2]


def norm_gradient(
    gradient: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, deviations: Tensor
) -> Tensor:
    """Return what RMSNorm passes back to its input x [..., channels], plus `residual`; written over `gradient`.

    `deviations`: fp32, one over the root of the mean square, for each row of x. The weight is frozen. Liger 0.8.5's own
    kernel has the rows a processor takes as a constant: it is compiled anew, 0.2 s, for micro-batches of other lengths.
    """
    gradient, x = gradient.contiguous(), x.contiguous()
    residual = None if residual is None else residual.contiguous()
    channels = x.shape[-1]
    block = next_power_of_2(channels)
    _norm_gradient[(x.numel() // channels,)](
        gradient,
        x if residual is None else residual,
        x,
        weight,
        deviations,
        channels,
        residual is not None,
        block,
        num_warps=max(1, min(16, block // 512)),
    )
    return gradient
