"""A Triton kernel for the vision tower's attention: images of any size in one call, no mask, no gradient.

FlashAttention 2 pads heads of 80 channels to 96 and was made for an older card. Here a head is read as a power of two
and the rest of one (80: 64 and 16), so nothing is computed in vain, and Triton uses the card's own instructions. The
algorithm is FlashAttention's (Dao, arXiv 2307.08691): one pass over the keys with a running maximum and sum.

Tensors are [patches, heads, channels], row-major, the patches of all images end to end. Scores and sums are fp32, the
weights are rounded to the dtype of v before they meet it. Every output is written by one program, without atomics: the
same call gives the same bits on one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2

_QUERIES, _KEYS = 128, 64  # of a tile, with 4 warps and 3 stages: the fastest of eleven on an H200


@DirectLaunch
@triton.jit(do_not_specialize=["patches", "images"])
def _attend(
    q,
    k,
    v,
    out,
    bounds,
    patches,
    images,
    heads,
    v_stride,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
):
    """out [patches, heads, D] of q, k, v [patches, heads, D], within the images that `bounds` [images + 1] part.

    Patches of v lie `v_stride` apart.

    A program computes M queries of one head. The first A channels of a head are one tile, B >= D - A the other.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    image, first, ended = 0, 0, 0  # tiles are numbered image after image
    for number in range(images):
        ended += (tl.load(bounds + number + 1) - tl.load(bounds + number) + M - 1) // M
        image = tl.where(tile >= ended, number + 1, image)
        first = tl.where(tile >= ended, ended, first)
    begin, end = tl.load(bounds + image), tl.load(bounds + image + 1)
    row = begin + (tile - first) * M + tl.arange(0, M)
    left, right = tl.arange(0, A), A + tl.arange(0, B)
    inside = (row < end)[:, None]
    real = (right < D)[None, :]
    stride = heads * D
    at = row[:, None].to(tl.int64) * stride + head * D
    q_left = tl.load(q + at + left[None, :], mask=inside, other=0.0)
    q_right = tl.load(q + at + right[None, :], mask=inside & real, other=0.0)
    largest = tl.full((M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    sum_left = tl.zeros((M, A), dtype=tl.float32)
    sum_right = tl.zeros((M, B), dtype=tl.float32)
    # Keys in whole tiles, then the rest, which alone needs masks.
    whole = begin + (end - begin) // N * N
    for key in range(begin, whole, N):
        place = (key + tl.arange(0, N))[:, None].to(tl.int64) * stride + head * D
        k_left = tl.load(k + place + left[None, :])
        k_right = tl.load(k + place + right[None, :], mask=real, other=0.0)
        scores = tl.dot(q_left, tl.trans(k_left))
        scores = tl.dot(q_right, tl.trans(k_right), scores)
        higher = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        kept = tl.exp2(largest - higher)
        total = total * kept + tl.sum(weights, axis=1)
        place = (key + tl.arange(0, N))[:, None].to(tl.int64) * v_stride + head * D
        v_left = tl.load(v + place + left[None, :])
        v_right = tl.load(v + place + right[None, :], mask=real, other=0.0)
        weights = weights.to(v_left.dtype)
        sum_left = tl.dot(weights, v_left, sum_left * kept[:, None])
        sum_right = tl.dot(weights, v_right, sum_right * kept[:, None])
        largest = higher
    if whole < end:
        column = whole + tl.arange(0, N)
        there = (column < end)[:, None]
        place = column[:, None].to(tl.int64) * stride + head * D
        k_left = tl.load(k + place + left[None, :], mask=there, other=0.0)
        k_right = tl.load(k + place + right[None, :], mask=there & real, other=0.0)
        scores = tl.dot(q_left, tl.trans(k_left))
        scores = tl.dot(q_right, tl.trans(k_right), scores)
        scores = tl.where((column < end)[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(largest - higher)
        total = total * kept + tl.sum(weights, axis=1)
        place = column[:, None].to(tl.int64) * v_stride + head * D
        v_left = tl.load(v + place + left[None, :], mask=there, other=0.0)
        v_right = tl.load(v + place + right[None, :], mask=there & real, other=0.0)
        weights = weights.to(v_left.dtype)
        sum_left = tl.dot(weights, v_left, sum_left * kept[:, None])
        sum_right = tl.dot(weights, v_right, sum_right * kept[:, None])
    sum_left /= total[:, None]
    sum_right /= total[:, None]
    tl.store(out + at + left[None, :], sum_left.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + right[None, :], sum_right.to(out.dtype.element_ty), mask=inside & real)


def attend_images(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """Attend every image's patches to each other: [P, heads, width], like q, k and v; without a gradient.

    In half precision on CUDA. `bounds` [N + 1] int32 on the device, where the N images begin and end; `lengths`: their
    patches, for the host. `scale` multiplies the scores. Widths from 32 on.
    """
    patches, heads, width = q.shape
    out = torch.empty_like(q)
    first = next_power_of_2(width + 1) // 2
    rest = max(16, next_power_of_2(width - first)) if width > first else 0
    if not rest:
        first, rest = first // 2, first // 2
    if v.stride(2) != 1 or v.stride(1) != width:
        v = v.contiguous()
    tiles = sum(cdiv(length, _QUERIES) for length in lengths)
    _attend[(tiles, heads)](
        q.contiguous(),
        k.contiguous(),
        v,
        out,
        bounds,
        patches,
        len(lengths),
        heads,
        v.stride(0),
        scale * 1.4426950408889634,  # the kernel's powers are of 2
        _QUERIES,
        _KEYS,
        first,
        rest,
        width,
        num_warps=4,
        num_stages=3,
    )
    return out
