"""Matrix products of frozen linear layers in 8 bits (e4m3): one scale for each row of activations and of weights.

The format is e4m3 (Micikevicius et al., arXiv 2209.05433) as PyTorch has it, `float8_e4m3fn`: 3 bits of mantissa, no
infinity, 448 as the largest number. A row's scale is its largest magnitude / 448 (fp32): the row times 448 / that
magnitude is clamped to [-448, 448] and rounded to the nearest e4m3 number, ties to even. So a token's numbers do not
depend on the tokens beside it, nor on the micro-batch it is in.

A weight [out, in] is quantized once, by its output rows. The backward pass multiplies by the same 8-bit weight: its
scales, which then stand along the summed dimension, go into the gradient before that is quantized. Products are summed
in fp32 and rounded once to the dtype of the activations. On a GPU of compute capability 8.9 and up this is
`torch._scaled_mm` with row-wise scales; elsewhere (tests on a CPU) the same quantized values are multiplied in fp32.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.model.resident import matrix_of, quantization_of

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
_TINY = 1e-12  # a row of zeros has a scale too


@dataclass(frozen=True)
class Fp8Rows:
    """A matrix in 8 bits: `values` e4m3 [rows, columns], `scales` fp32 [rows, 1]; it stands for values * scales."""

    values: Tensor
    scales: Tensor


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> Fp8Rows:
    """Quantize x [rows, columns], of any floating dtype, with one scale a row.

    Column c is multiplied by `factors` [columns], fp32, first, if there are any.
    """
    return quantize_together([x], None if factors is None else [factors])


def quantize_together(parts: Sequence[Tensor], factors: Sequence[Tensor] | None = None) -> Fp8Rows:
    """Quantize up to three matrices [rows, columns] side by side as `quantize_rows` does: a row of all has one scale.

    `factors`: fp32 [columns] of each matrix.
    """
    if parts[0].is_cuda:
        from trainer.model.fp8_kernels import quantize_rows as on_gpu

        return Fp8Rows(*on_gpu(parts, factors))
    wide = torch.cat([part.float() for part in parts], dim=1)
    if factors is not None:
        wide = wide * torch.cat(list(factors))
    largest = wide.abs().amax(1, keepdim=True).clamp_(min=_TINY)
    return Fp8Rows((wide * (LARGEST / largest)).clamp_(-LARGEST, LARGEST).to(E4M3), largest / LARGEST)


def forward_product(x: Fp8Rows, weight: Fp8Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x @ weight.T + bias as [rows, out] in `dtype`, of x [rows, in], weight [out, in] and bias [out].

    Summed in fp32. `torch._scaled_mm` wants `in` and `out` to be multiples of 16 and refuses others (RuntimeError).
    """
    if x.values.is_cuda:
        return torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scales,
            scale_b=weight.scales.t(),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=True,  # 8 % faster; the same error to 1 % of it
        )
    product = (x.values.float() @ weight.values.float().t()) * x.scales * weight.scales.t()
    return (product if bias is None else product + bias).to(dtype)


def backward_product(gradients: Sequence[Tensor], weights: Sequence[Fp8Rows]) -> Tensor:
    """Return the sum of gradient [rows, out] @ weight [out, in] over layers of one input: [rows, in], in their dtype.

    It is one product over all layers, so a row's gradients of all of them share a scale: what is small beside the
    others in a row is small in the sum too.
    """
    return backward_product_of_rows(
        quantize_together(gradients, scales_of(weights)), weights, gradients[0].dtype
    )


def scales_of(weights: Sequence[Fp8Rows]) -> list[Tensor]:
    """Return the fp32 scales [out] of each weight, by which gradients are multiplied before they are quantized."""
    return [weight.scales.view(-1) for weight in weights]


def backward_product_of_rows(gradients: Fp8Rows, weights: Sequence[Fp8Rows], dtype: torch.dtype) -> Tensor:
    """Return `backward_product` of gradients that are quantized already: [rows, in] in `dtype`.

    `gradients`: [rows, out of all layers], multiplied by `scales_of` before they were quantized.
    """
    if gradients.values.is_cuda:
        from trainer.model.fp8_kernels import transposed

        turned = transposed([weight.values for weight in weights])
        return torch._scaled_mm(
            gradients.values,
            turned.t(),
            scale_a=gradients.scales,
            scale_b=gradients.scales.new_ones(1, len(turned)),
            out_dtype=dtype,
            use_fast_accum=True,  # 8 % faster; the same error to 1 % of it
        )
    values = torch.cat([weight.values.float() for weight in weights])
    return ((gradients.values.float() @ values) * gradients.scales).to(dtype)


# --- layers whose products are in 8 bits ----------------------------------------------------------------------------


class Fp8Linear(nn.Linear):
    """A frozen linear layer held in 8 bits: `weight` uint8 [out, in], the bytes of e4m3; `quant_state` its scales.

    uint8, because neither NCCL nor DeepSpeed moves e4m3 on every version.
    """

    quant_state: Tensor


def hold_in_fp8(layer: nn.Linear, dtype: torch.dtype) -> Fp8Linear:
    """Return a layer that holds the weight of `layer`, 4-bit or plain, in 8 bits, one scale an output row.

    A 4-bit weight is dequantized to `dtype`, that of the products, before it is rounded; the bias is held in `dtype`.
    """
    rows = quantize_rows(matrix_of(layer.weight.data, quantization_of(layer), dtype))
    with torch.device("meta"):
        held = Fp8Linear(layer.in_features, layer.out_features, bias=False)
    held.weight = nn.Parameter(rows.values.view(torch.uint8), requires_grad=False)
    held.register_buffer("quant_state", rows.scales, persistent=False)
    if layer.bias is not None:
        held.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return held


def rows_of_weight(weight: Tensor, packed: Any, dtype: torch.dtype) -> Fp8Rows:
    """Return a weight [out, in] in 8 bits: as it is held, or quantized now from its 4 bits or from `dtype`.

    `packed`: as of `quantization_of`: the scales of a weight held in 8 bits, bitsandbytes' state of one in 4, or None.
    """
    if isinstance(packed, Tensor):
        return Fp8Rows(weight.view(E4M3), packed)
    return quantize_rows(matrix_of(weight, packed, dtype))


def is_fp8(layer: nn.Module) -> bool:
    """Return whether a linear layer's products are in 8 bits (`use_fp8_products`)."""
    return layer.__dict__.get("fp8_products", False) is True


def frozen_linears(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Linear]]:
    """List (parent, name, layer) of the linear layers of decoder layers, without those of the adapters."""
    return [
        (parent, name, child)
        for layer in layers
        for parent in layer.modules()
        if not isinstance(parent, nn.ModuleDict)  # of an adapter
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and not isinstance(child, LoraLayer)
    ]


def use_fp8_products(layers: Iterable[nn.Module], dtype: torch.dtype, *, resident: bool) -> int:
    """Let the frozen linear layers of decoder layers compute in 8 bits; return the bytes that are held so.

    `resident`: each weight is quantized now and held in place of the old one, one layer after another; else it is
    quantized in every pass from what the layer holds. `dtype`: of the products.
    """
    held = 0
    for parent, name, layer in frozen_linears(layers):
        if resident:
            layer = hold_in_fp8(layer, dtype)
            setattr(parent, name, layer)
            held += layer.weight.nbytes
        layer.fp8_products = True  # type: ignore[assignment]
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return held


def _forward(layer: Any, x: Tensor) -> Tensor:
    """`nn.Linear.forward` and `Linear4bit.forward` with a product of 8 bits, in the dtype of autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return cast(Tensor, _Product.apply(x, layer.weight, layer.bias, quantization_of(layer)))


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, with a gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, packed: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.packed = packed
        with torch.autocast(x.device.type, enabled=False):
            rows = quantize_rows(x.reshape(-1, x.shape[-1]))
            bias = None if bias is None else bias.to(x.dtype)
            output = forward_product(rows, rows_of_weight(weight, packed, x.dtype), bias, x.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            of_x = backward_product([gradient], [rows_of_weight(weight, ctx.packed, gradient.dtype)])
        return of_x.view(*gradients[0].shape[:-1], -1), None, None, None
