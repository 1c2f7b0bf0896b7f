"""Triton kernels: what the vision tower computes between its matrix products, and the gradient of a norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2


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
