"""The second half of a decoder layer whose linear layers have no adapter, as one autograd function.

With few samples a GPU the host launches a layer's kernels hardly faster than the GPU computes them: four functions and
as many modules around the same launches take it a fifth longer. The numbers are those of the passes one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.model import kernels
from trainer.model.autocast_off import AutocastOff
from trainer.model.fp8 import is_fp8
from trainer.model.liger_kernels import norm_of_sum_forward
from trainer.model.pass_kernels import swiglu_forward, swiglu_gradient
from trainer.model.resident import MANY_ROWS, matrix_of, quantization_of


def frozen_linears_of(mlp: nn.Module, x: Tensor) -> list[nn.Linear] | None:
    """Return gate, up and down projection where they are plain or of 4 bits, without adapter and bias; else None.

    `x` is [..., hidden]. In 4 bits also None for so few rows that bitsandbytes multiplies without dequantizing.
    """
    parts = mlp._modules
    layers = [cast(nn.Linear, parts[name]) for name in ("gate_proj", "up_proj", "down_proj")]
    for layer in layers:
        if isinstance(layer, LoraLayer) or is_fp8(layer) or layer._parameters.get("bias") is not None:
            return None
    few = x.numel() <= MANY_ROWS * x.shape[-1]
    return None if few and quantization_of(layers[2]) is not None else layers


def add_norm_frozen_mlp(attended: Tensor, residual: Tensor, norm: Any, layers: Sequence[nn.Linear]) -> Tensor:
    """Return total + mlp(norm(total)), where total = attended + residual; [1, T, hidden] all of them.

    `layers`: gate, up and down projection (`frozen_linears_of`).
    """
    weights = [layer._parameters["weight"] for layer in layers]
    packed = [quantization_of(layer) for layer in layers]
    with AutocastOff(attended):
        return cast(
            Tensor,
            _Mlp.apply(attended, residual, norm.weight, norm.variance_epsilon, packed, *weights),
        )


class _Mlp(torch.autograd.Function):
    """As `add_norm_frozen_mlp`. Saves the sum, its norm's deviations, gate and up, which become their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        attended: Tensor,
        residual: Tensor,
        norm: Tensor,
        epsilon: float,
        packed: Sequence[Any],
        *weights: Tensor,
    ) -> Tensor:
        normed, total, deviations = norm_of_sum_forward(attended, residual, norm, epsilon)
        dtype = normed.dtype
        gate, up = (linear(normed, matrix_of(weights[at], packed[at], dtype)) for at in (0, 1))
        hidden = swiglu_forward(gate, up)
        output = linear(hidden, matrix_of(weights[2], packed[2], dtype)).add_(total)
        ctx.save_for_backward(total, norm, deviations, gate, up, *weights)
        ctx.packed = packed
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        total, norm, deviations, gate, up, *weights = ctx.saved_tensors
        matrices = zip(weights, ctx.packed, strict=True)
        of_gate, of_up, of_down = (matrix_of(*each, total.dtype) for each in matrices)
        of_output = gradients[0].reshape(-1, total.shape[-1])
        swiglu_gradient(of_output.mm(of_down), gate, up)  # gate and up are their gradients now
        of_normed = gate.view(-1, gate.shape[-1]).mm(of_gate)
        of_normed.addmm_(up.view(-1, up.shape[-1]), of_up)
        change = kernels.norm_gradient(of_normed, of_output, total, norm, deviations).view(total.shape)
        return change, change, *[None] * (3 + len(weights))
