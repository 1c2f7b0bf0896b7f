"""Triton kernels: LoRA layers with sample dropout, whose masks are made where they are used and never stored.

A mask is `trainer.model.dropout.keep_mask`'s, to the bit: the same integer arithmetic on the same row keys and
channel words. Each kernel reads the activation once, for two adapters of the same input where they are alike; the plain
form makes, stores and applies each mask in six passes over it. R is the rank of the adapters, filled up with zeros to a
power of 2 of at least 16, which `tl.dot` needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2

LARGEST_RANK = 128
"""The largest whose tiles were seen to fit into the shared memory of every card: 99 KB."""

_TOKENS, _WARPS = 64, 4  # of a tile
# Channels of one: forward, for ranks to 16, and backward. The fastest of seven tiles on an H200.
_WIDE, _NARROW = 128, 64
_SHARES = 16  # of the tokens in `adapter_gradients`, added up in a fixed order


class Adapter(NamedTuple):
    """The first half of a LoRA, down [rank, channels], and the dropout before it; what comes out is times `factor`.

    `rows` int32 [T, 2] and `words` int32 [channels / 2] make the mask, `dropped` of 65536 draws are not kept, `scale`
    makes up for them. With `dropped` 0 neither `rows` nor `words` is read, and `scale` is 1.
    """

    down: Tensor
    rows: Tensor
    words: Tensor
    dropped: int
    scale: float
    factor: float


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


@triton.jit
def _dropped_out(tile, rows, words, token, begin, channels, inside, DROPPED: tl.constexpr, C: tl.constexpr):
    """The tile with zeros where dropped; what is kept is scaled in the sums of products."""
    if DROPPED > 0:
        tile = tl.where(_kept(rows, words, token, begin, channels, inside, DROPPED, C), tile, 0.0)
    return tile


@triton.jit
def _matrix(down, row, real, channel, there, channels):
    """[R, C] of down [rank, channels]."""
    at = row[:, None] * channels + channel[None, :]
    return tl.load(down + at, mask=real[:, None] & there[None, :], other=0.0)


@triton.jit
def _inner(inner, token, inside, row, real, rank):
    """[T, R] of inner [tokens, rank]."""
    at = token[:, None].to(tl.int64) * rank + row[None, :]
    return tl.load(inner + at, mask=inside[:, None] & real[None, :], other=0.0)


# The number of tokens is another in every micro-batch: a kernel compiled anew for multiples of 16 would stop a step.
_any_length = triton.jit(do_not_specialize=["tokens"])


@DirectLaunch
@_any_length
def _project(
    x, down, down_2, rows, rows_2, words, out, out_2, tokens, channels, rank, factor,
    DROPPED: tl.constexpr, BOTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [tokens, rank] = factor * dropout(x) [tokens, channels] @ down [rank, channels].T; of a second where BOTH"""
    token = tl.program_id(0) * T + tl.arange(0, T)
    row = tl.arange(0, R)
    inside, real = token < tokens, row < rank
    total = tl.zeros((T, R), dtype=tl.float32)
    total_2 = tl.zeros((T, R), dtype=tl.float32)
    for begin in range(0, channels, C):
        channel = begin + tl.arange(0, C)
        there = channel < channels
        at = token[:, None].to(tl.int64) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & there[None, :], other=0.0)
        left = _dropped_out(tile, rows, words, token, begin, channels, inside, DROPPED, C)
        right = _matrix(down, row, real, channel, there, channels)
        total += tl.dot(left, tl.trans(right.to(tile.dtype)))
        if BOTH:
            left = _dropped_out(tile, rows_2, words, token, begin, channels, inside, DROPPED, C)
            right = _matrix(down_2, row, real, channel, there, channels)
            total_2 += tl.dot(left, tl.trans(right.to(tile.dtype)))
    at = token[:, None].to(tl.int64) * rank + row[None, :]
    tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])
    if BOTH:
        tl.store(
            out_2 + at, (total_2 * factor).to(out.dtype.element_ty), mask=inside[:, None] & real[None, :]
        )


@DirectLaunch
@_any_length
def _add_products(
    out, right, right_2, rows, rows_2, words, inner, inner_2, tokens, channels, rank, of_row, of_channel, factor,
    DROPPED: tl.constexpr, BOTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [tokens, channels] += factor * dropout's own of (inner [tokens, rank] @ right [rank, channels])

    `of_row` and `of_channel`: the strides of `right`. Where BOTH, the product of a second is added too.
    """
    token = tl.program_id(0) * T + tl.arange(0, T)
    begin = tl.program_id(1) * C
    channel = begin + tl.arange(0, C)
    row = tl.arange(0, R)
    inside, there, real = token < tokens, channel < channels, row < rank
    at = row[:, None] * of_row + channel[None, :] * of_channel
    matrix = tl.load(right + at, mask=real[:, None] & there[None, :], other=0.0)
    left = _inner(inner, token, inside, row, real, rank)
    change = tl.dot(left, matrix.to(left.dtype))
    change = _dropped_out(change, rows, words, token, begin, channels, inside, DROPPED, C)
    if BOTH:
        matrix = tl.load(right_2 + at, mask=real[:, None] & there[None, :], other=0.0)
        left = _inner(inner_2, token, inside, row, real, rank)
        second = tl.dot(left, matrix.to(left.dtype))
        change += _dropped_out(second, rows_2, words, token, begin, channels, inside, DROPPED, C)
    at = out + token[:, None].to(tl.int64) * channels + channel[None, :]
    both = inside[:, None] & there[None, :]
    before = tl.load(at, mask=both, other=0.0)
    tl.store(at, (before.to(tl.float32) + change * factor).to(before.dtype), mask=both)


@DirectLaunch
@_any_length
def _gradients_of_down(
    x, rows, rows_2, words, inner, inner_2, out, out_2, tokens, channels, rank, share, factor,
    DROPPED: tl.constexpr, BOTH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [shares, rank, channels]: factor * inner [tokens, rank].T @ dropout(x) [tokens, channels] of each share"""
    begin = tl.program_id(0) * C
    channel = begin + tl.arange(0, C)
    row = tl.arange(0, R)
    there, real = channel < channels, row < rank
    total = tl.zeros((R, C), dtype=tl.float32)
    total_2 = tl.zeros((R, C), dtype=tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, first + share, T):
        token = start + tl.arange(0, T)
        inside = token < tokens
        at = token[:, None].to(tl.int64) * channels + channel[None, :]
        tile = tl.load(x + at, mask=inside[:, None] & there[None, :], other=0.0)
        right = _dropped_out(tile, rows, words, token, begin, channels, inside, DROPPED, C)
        total += tl.dot(tl.trans(_inner(inner, token, inside, row, real, rank)), right)
        if BOTH:
            right = _dropped_out(tile, rows_2, words, token, begin, channels, inside, DROPPED, C)
            total_2 += tl.dot(tl.trans(_inner(inner_2, token, inside, row, real, rank)), right)
    at = (tl.program_id(1) * rank + row)[:, None] * channels + channel[None, :]
    tl.store(out + at, total * factor, mask=real[:, None] & there[None, :])
    if BOTH:
        tl.store(out_2 + at, total_2 * factor, mask=real[:, None] & there[None, :])


def project(x: Tensor, adapters: Sequence[Adapter]) -> list[Tensor]:
    """Return factor * dropout(x) @ down.T of each adapter: [T, rank] in the dtype of x [T, channels]."""
    tokens, channels = x.shape
    outputs = [x.new_empty(tokens, len(adapter.down)) for adapter in adapters]
    for one, two in _launches(adapters):
        first, second = adapters[one], adapters[two]
        filled_up = _filled_up(len(first.down))
        wide = _WIDE * 16 // filled_up  # the tiles of the adapters take as much shared memory at every rank
        _project[(cdiv(tokens, _TOKENS),)](
            *(x, first.down, second.down, first.rows, second.rows, first.words, outputs[one], outputs[two]),
            *(tokens, channels, len(first.down), first.factor * first.scale),
            *(first.dropped, one != two, _TOKENS, wide, filled_up),
            num_warps=_WARPS,
        )
    return outputs


def add_up(output: Tensor, inner: Tensor, up: Tensor) -> None:
    """Add inner @ up.T to `output` [T, channels], in place: inner is [T, rank], up [channels, rank].

    cuBLAS takes longer, and milliseconds of the host to choose a kernel for a number of tokens that it has not seen.
    """
    tokens, channels = output.shape
    rank = up.shape[1]
    grid = (cdiv(tokens, _TOKENS), cdiv(channels, _WIDE))
    _add_products[grid](
        *(output, up, up, inner, inner, inner, inner, inner, tokens, channels, rank, *up.t().stride(), 1.0),
        *(0, False, _TOKENS, _WIDE, _filled_up(rank)),
        num_warps=_WARPS,
    )


def add_back(gradient: Tensor, inners: Sequence[Tensor], adapters: Sequence[Adapter]) -> None:
    """Add what `project` passes back for each of `inners` [T, rank] to `gradient` [T, channels], in place."""
    tokens, channels = gradient.shape
    grid = (cdiv(tokens, _TOKENS), cdiv(channels, _NARROW))
    for one, two in _launches(adapters):
        first, second = adapters[one], adapters[two]
        rank = len(first.down)
        _add_products[grid](
            *(
                gradient,
                first.down,
                second.down,
                first.rows,
                second.rows,
                first.words,
                inners[one],
                inners[two],
            ),
            *(tokens, channels, rank, channels, 1, first.factor * first.scale),
            *(first.dropped, one != two, _TOKENS, _NARROW, _filled_up(rank)),
            num_warps=_WARPS,
        )


def adapter_gradients(x: Tensor, inners: Sequence[Tensor], adapters: Sequence[Adapter]) -> list[Tensor]:
    """Return factor * inner.T @ dropout(x) for each of `inners` [T, rank]: fp32 [rank, channels].

    They are added up in the same order every time.
    """
    tokens, channels = x.shape
    # Tiles of `inners` that fit into shared memory.
    tile = min(_TOKENS, 4096 // max(_filled_up(len(adapter.down)) for adapter in adapters))
    share = cdiv(cdiv(tokens, _SHARES), tile) * tile
    grid = (cdiv(channels, _NARROW), cdiv(tokens, share))
    outputs = [
        torch.empty(grid[1], len(adapter.down), channels, dtype=torch.float32, device=x.device)
        for adapter in adapters
    ]
    for one, two in _launches(adapters):
        first, second = adapters[one], adapters[two]
        _gradients_of_down[grid](
            *(x, first.rows, second.rows, first.words, inners[one], inners[two], outputs[one], outputs[two]),
            *(tokens, channels, len(first.down), share, first.factor * first.scale),
            *(first.dropped, one != two, tile, _NARROW, _filled_up(len(first.down))),
            num_warps=_WARPS,
        )
    return [output.sum(0) for output in outputs]


def _launches(adapters: Sequence[Adapter]) -> Iterator[tuple[int, int]]:
    """The places of two adapters that a kernel computes together, or of one twice."""
    place = 0
    while place < len(adapters):
        pair = adapters[place : place + 2]
        alike = len(pair) == 2 and _constants(pair[0]) == _constants(pair[1])
        yield place, place + alike
        place += 1 + alike


def _constants(adapter: Adapter) -> tuple[int, int, float, float]:
    return len(adapter.down), *adapter[3:]


def _filled_up(rank: int) -> int:
    return max(16, next_power_of_2(rank))
