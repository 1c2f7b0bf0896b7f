"""The vision tower's attention on Hopper (H100, H200), in Gluon (`trainer.model.hopper_tiles`).

`trainer.model.attention_kernel` computes an address for every number that it reads, and waits for the sums of a tile
before it begins the next. Here tiles come through the card's copy engine, and the scores of a tile are begun while the
sums of the one before are added up. What else waits is filled by the other programs of a processor: eight warps of few
registers leave room for two. The order of FlashAttention 3 (Shah et al., arXiv 2407.08608), which computes a softmax
beside the products of its own program, was slower for heads of 80 channels (`benchmarks/NOTES.md`).

Numbers and limits are those of `attention_kernel`: scores and sums fp32, weights rounded to the dtype of v before they
meet it, every output written by one program. A NaN in an image's v may reach the image before it in the pass, whose
last tile reads on: such a run has failed anyhow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trainer.model.hopper_tiles import arrived, as_rows, every_warp, load, product, soften, tiles, times_rows
from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2

_KEYS, _PLACES = 64, 2  # keys of a tile, tiles of them in flight


@gluon.jit
def _fetch(left_d, right_d, left, right, bars, number, begin, column, there, S: gl.constexpr):
    """Let the copy engine bring both parts of tile `number` of keys or values, where it is `there`."""
    slot, row = number % S, begin + number * left_d.block_type.shape[0]
    mbarrier.expect(bars.index(slot), left_d.block_type.nbytes + right_d.block_type.nbytes, pred=there)
    load(left_d, [row, column], bars.index(slot), left.index(slot), pred=there)
    load(right_d, [row, column + left_d.block_type.shape[1]], bars.index(slot), right.index(slot), pred=there)


@gluon.jit
def _scores(q_left, q_right, k_left, k_right, number, zero, S: gl.constexpr):
    scores = product(q_right, k_right, number, zero, S)
    return warpgroup_mma(q_left, k_left.index(number % S).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _sums(weights, v_left, v_right, left_sum, right_sum, slot):
    left = warpgroup_mma(as_rows(weights, left_sum), v_left.index(slot), left_sum, is_async=True)
    right = warpgroup_mma(as_rows(weights, right_sum), v_right.index(slot), right_sum, is_async=True)
    return left, right


@gluon.jit
def _store(out, x, first, end, stride, column, dtype: gl.constexpr):
    row = first + gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    channel = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    at = row.to(gl.int64)[:, None] * stride + channel[None, :]
    gl.store(out + at, x.to(dtype), mask=(row < end)[:, None])


@DirectLaunch
@gluon.jit(do_not_specialize=["images"])
def _attend(
    q_left_d, q_right_d, k_left_d, k_right_d, v_left_d, v_right_d, out, bounds, images, heads, scale,
    M: gl.constexpr, N: gl.constexpr, A: gl.constexpr, B: gl.constexpr, S: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out [patches, heads, A + B] of q, k, v, within the images that `bounds` [images + 1] part.

    A program computes M queries of one head, N keys at a time, S tiles of them in flight. Descriptors are of
    [patches, heads * (A + B)], in blocks of A channels and of the B that follow.
    """
    tile, head = gl.program_id(0), gl.program_id(1)
    image, first, ended = 0, 0, 0  # tiles are numbered image after image
    for i in range(images):
        ended += (gl.load(bounds + i + 1) - gl.load(bounds + i) + M - 1) // M
        image = gl.where(tile >= ended, i + 1, image)
        first = gl.where(tile >= ended, ended, first)
    begin, end = gl.load(bounds + image), gl.load(bounds + image + 1)
    first = begin + (tile - first) * M
    column, count = head * (A + B), (end - begin + N - 1) // N
    dtype: gl.constexpr = q_left_d.dtype
    q_left = gl.allocate_shared_memory(dtype, [M, A], q_left_d.layout)
    q_right = gl.allocate_shared_memory(dtype, [M, B], q_right_d.layout)
    k_left = gl.allocate_shared_memory(dtype, [S, N, A], k_left_d.layout)
    k_right = gl.allocate_shared_memory(dtype, [S, N, B], k_right_d.layout)
    v_left = gl.allocate_shared_memory(dtype, [S, N, A], v_left_d.layout)
    v_right = gl.allocate_shared_memory(dtype, [S, N, B], v_right_d.layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    for slot in gl.static_range(S):
        mbarrier.init(k_bars.index(slot), count=1)
        mbarrier.init(v_bars.index(slot), count=1)
    fence_async_shared()
    every_warp()
    mbarrier.expect(q_bar, q_left_d.block_type.nbytes + q_right_d.block_type.nbytes)
    load(q_left_d, [first, column], q_bar, q_left)
    load(q_right_d, [first, column + A], q_bar, q_right)
    for i in gl.static_range(S):
        _fetch(k_left_d, k_right_d, k_left, k_right, k_bars, i, begin, column, i < count, S)
        _fetch(v_left_d, v_right_d, v_left, v_right, v_bars, i, begin, column, i < count, S)
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    of_left: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, A, 16])
    of_right: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, B, 16])
    zero = gl.zeros([M, N], gl.float32, of_scores)
    largest = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, of_scores))
    left = warpgroup_mma_init(gl.zeros([M, A], gl.float32, of_left))
    right = warpgroup_mma_init(gl.zeros([M, B], gl.float32, of_right))
    mbarrier.wait(q_bar, 0)
    for number in range(count - 1):
        arrived(k_bars, number, True, S)
        scores = warpgroup_mma_wait(0, deps=(_scores(q_left, q_right, k_left, k_right, number, zero, S),))
        largest, weights, kept, total = soften(scores, largest, total, scale)
        left_sum, right_sum = warpgroup_mma_wait(0, deps=(left, right))
        every_warp()  # has the scores of this tile and the sums of the one before: their places are free
        ahead, behind = number + S, number - 1 + S
        _fetch(k_left_d, k_right_d, k_left, k_right, k_bars, ahead, begin, column, ahead < count, S)
        there = (behind < count) & (number > 0)
        _fetch(v_left_d, v_right_d, v_left, v_right, v_bars, behind, begin, column, there, S)
        left_sum, right_sum = times_rows(left_sum, kept), times_rows(right_sum, kept)
        arrived(v_bars, number, True, S)
        left, right = _sums(weights.to(dtype), v_left, v_right, left_sum, right_sum, number % S)
    last = count - 1  # the one tile that may be filled up with keys of the next image, or with zeros
    arrived(k_bars, last, True, S)
    scores = warpgroup_mma_wait(0, deps=(_scores(q_left, q_right, k_left, k_right, last, zero, S),))
    key = begin + last * N + gl.arange(0, N, gl.SliceLayout(0, of_scores))
    scores = gl.where((key < end)[None, :], scores, float("-inf"))
    largest, weights, kept, total = soften(scores, largest, total, scale)
    left_sum, right_sum = warpgroup_mma_wait(0, deps=(left, right))
    left_sum, right_sum = times_rows(left_sum, kept), times_rows(right_sum, kept)
    arrived(v_bars, last, True, S)
    left, right = _sums(weights.to(dtype), v_left, v_right, left_sum, right_sum, last % S)
    left_sum, right_sum = warpgroup_mma_wait(0, deps=(left, right))
    _store(out, times_rows(left_sum, 1 / total), first, end, heads * (A + B), column, dtype)
    _store(out, times_rows(right_sum, 1 / total), first, end, heads * (A + B), column + A, dtype)


def attend_images_on_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    lengths: Sequence[int],
    scale: float,
    queries: int = 128,
) -> Tensor:
    """As `attention_kernel.attend_images`; in half precision on a GPU of compute capability 9.0.

    Raises:
        ValueError: the width is not the sum of two powers of 2 from 16 on.
    """
    patches, heads, width = q.shape
    first = next_power_of_2(width + 1) // 2
    rest = width - first
    if rest < 16 or rest != next_power_of_2(rest):
        raise ValueError(f"attention: heads of {width} channels are not two tiles")
    if v.stride(2) != 1 or v.stride(1) != width:
        v = v.contiguous()
    out = torch.empty(patches, heads, width, dtype=q.dtype, device=q.device)
    parts = first, rest
    grid = sum(cdiv(length, queries) for length in lengths), heads
    _attend[grid](
        *tiles(q.contiguous(), queries, parts),
        *tiles(k.contiguous(), _KEYS, parts),
        *tiles(v, _KEYS, parts),
        out,
        bounds,
        len(lengths),
        heads,
        scale * 1.4426950408889634,  # the kernel's powers are of 2
        queries,
        _KEYS,
        first,
        rest,
        _PLACES,
        num_warps=queries // 16,
    )
    return out
