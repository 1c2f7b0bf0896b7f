"""The second half of a decoder layer in 8 bits: norm, SwiGLU and its gradient quantize what they compute in their pass.

A row of 18,944 numbers is then written once, in 8 bits, where it was written in bfloat16, read and written again. The
numbers are those of the passes one after another, but that the gradients of gate and up share a row's scale.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.model import fp8_kernels, kernels
from trainer.model.fp8 import (
    Fp8Rows,
    backward_product,
    backward_product_of_rows,
    forward_product,
    is_fp8,
    rows_of_weight,
    scales_of,
)
from trainer.model.resident import quantization_of


def takes_mlp(mlp: Any) -> bool:
    """Return whether its three layers are in 8 bits and have no adapter, which needs its input as it is."""
    layers: list[nn.Linear] = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return all(is_fp8(layer) and layer.bias is None for layer in layers)


def add_norm_mlp(attended: Tensor, residual: Tensor, norm: Any, mlp: Any) -> Tensor:
    """Return total + mlp(norm(total)), where total = attended + residual; [1, T, hidden] all of them."""
    layers = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    packed = [quantization_of(layer) for layer in layers]
    weights = [layer.weight for layer in layers]
    return cast(Tensor, _Mlp.apply(attended, residual, norm.weight, norm.variance_epsilon, packed, *weights))


class _Mlp(torch.autograd.Function):
    """As `add_norm_mlp`. Saves the sum, its norm's deviations, gate and up."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        residual: Tensor,
        norm: Tensor,
        epsilon: float,
        packed: Any,
        *weights: Tensor,
    ) -> Tensor:
        dtype, flat = attended.dtype, (-1, attended.shape[-1])
        with torch.autocast(attended.device.type, enabled=False):
            total, *normed, deviations = fp8_kernels.norm_of_sum(
                attended.reshape(flat), residual.reshape(flat), norm, epsilon
            )
            of_gate, of_up, of_down = _rows(weights, packed, dtype)
            gate = forward_product(Fp8Rows(*normed), of_gate, None, dtype)
            up = forward_product(Fp8Rows(*normed), of_up, None, dtype)
            output = forward_product(Fp8Rows(*fp8_kernels.swiglu(gate, up)), of_down, None, dtype).add_(total)
        ctx.save_for_backward(total, norm, deviations, gate, up, *weights)
        ctx.packed = packed
        return output.view(attended.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        total, norm, deviations, gate, up, *weights = ctx.saved_tensors
        gradient = gradients[0].reshape(total.shape)
        with torch.autocast(gradient.device.type, enabled=False):
            *inner, of_down = _rows(weights, ctx.packed, gradient.dtype)
            back = backward_product([gradient], [of_down])
            rows = Fp8Rows(*fp8_kernels.swiglu_gradient(back, gate, up, scales_of(inner)))
            of_normed = backward_product_of_rows(rows, inner, gradient.dtype)
            change = kernels.norm_gradient(of_normed, gradient, total, norm, deviations)
        change = change.view(gradients[0].shape)
        return change, change, *[None] * (3 + len(weights))


def _rows(weights: Any, packed: Any, dtype: torch.dtype) -> list[Fp8Rows]:
    return [rows_of_weight(weight, each, dtype) for weight, each in zip(weights, packed, strict=True)]
