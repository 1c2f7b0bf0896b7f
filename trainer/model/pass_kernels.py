"""Triton kernels for passes between products: SwiGLU both ways, the tower's LayerNorm with the addition before it."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2

_BLOCK = 2048  # of SwiGLU: Liger's has a row a program, of 18,944 numbers in 32,768 places


@DirectLaunch
@triton.jit
def _swiglu(gate, up, out, values, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    wide = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=inside, other=0.0)
    silu = (wide * tl.sigmoid(wide)).to(factor.dtype)
    tl.store(out + at, (silu.to(tl.float32) * factor.to(tl.float32)).to(factor.dtype), mask=inside)


@DirectLaunch
@triton.jit
def _swiglu_gradient(gradient, gate, up, values, BLOCK: tl.constexpr):
    """gate and up become their gradients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < values
    value = tl.load(gate + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    factor = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    back = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = wide * sigmoid
    tl.store(gate + at, (back * (silu * (1 - sigmoid) + sigmoid) * factor).to(value.dtype), mask=inside)
    tl.store(up + at, (back * silu).to(value.dtype), mask=inside)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up. Liger's numbers; as there, gradients are written over gate and up, which nobody else reads."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        swiglu_gradient(gradients[0].contiguous(), gate, up)
        return gate, up


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, outside the graph; both are contiguous."""
    out, values = torch.empty_like(up), gate.numel()
    _swiglu[(cdiv(values, _BLOCK),)](gate, up, out, values, _BLOCK)
    return out


def swiglu_gradient(gradient: Tensor, gate: Tensor, up: Tensor) -> None:
    """Write the gradients of gate and up over them, from that of silu(gate) * up; all three are contiguous."""
    values = gate.numel()
    _swiglu_gradient[(cdiv(values, _BLOCK),)](gradient, gate, up, values, _BLOCK)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up: outputs of linear layers, which are not used again."""
    return cast(Tensor, _SwiGlu.apply(gate, up))


@DirectLaunch
@triton.jit
def _layer_norm(
    x,
    residual,
    after,
    weight,
    bias,
    total,
    out,
    columns,
    epsilon,
    ADDED: tl.constexpr,
    AFTER: tl.constexpr,
    C: tl.constexpr,
):
    """out = LayerNorm of x + residual where ADDED, else of x; total = x + residual, plus `after` where AFTER.

    A row a program.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    there = column < columns
    at = row * columns + column
    value = tl.load(x + at, mask=there, other=0.0)
    if ADDED:
        value = (value.to(tl.float32) + tl.load(residual + at, mask=there, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        summed = value
        if AFTER:
            further = tl.load(after + column, mask=there, other=0.0).to(tl.float32)
            summed = (value.to(tl.float32) + further).to(value.dtype)
        tl.store(total + at, summed, mask=there)
    wide = value.to(tl.float32)
    apart = tl.where(there, wide - tl.sum(wide, axis=0) / columns, 0.0)
    deviation = tl.rsqrt(tl.sum(apart * apart, axis=0) / columns + epsilon)
    scaled = apart * deviation * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    scaled += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, scaled.to(value.dtype), mask=there)


def layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x + residual or x, its LayerNorm over the last dimension), without a gradient.

    `after` [columns], with a residual alone: is added to the sum that is returned, once it is normalized.
    """
    x = x.contiguous()
    columns = x.shape[-1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    residual_or_x = x if residual is None else residual.contiguous()
    block = next_power_of_2(columns)
    _layer_norm[(x.numel() // columns,)](
        x,
        residual_or_x,
        weight if after is None else after,
        weight,
        bias,
        total,
        out,
        columns,
        epsilon,
        residual is not None,
        after is not None,
        block,
        num_warps=max(1, min(16, block // 1024)),
    )
    return total, out
