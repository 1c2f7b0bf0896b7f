"""Frozen linear layers and their LoRA as one autograd function, for the layers that are fed the same input.

The products are PyTorch's, in bfloat16 or 8 bits (`trainer.model.fp8`); what LoRA and its dropout add is computed by
`trainer.model.lora_kernels`. LoRA's product is always in the dtype of the input, also beside 8-bit products: its down
and up are fp32, rounded to that dtype in every pass, and their gradients are fp32. A micro-batch's gradient of an
adapter is one product over its tokens, whose rounding depends on which tokens are together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.model.autocast_off import AutocastOff
from trainer.model.dropout import DRAWS, SampleDropout, channel_words
from trainer.model.fp8 import (
    Fp8Rows,
    backward_product,
    forward_product,
    is_fp8,
    quantize_rows,
    rows_of_weight,
)
from trainer.model.lora_kernels import LARGEST_RANK, Adapter, adapter_gradients, add_back, add_up, project
from trainer.model.resident import in_dtype, matrix_of, quantization_of


class _Layer(NamedTuple):
    """What a linear layer and its adapter are besides tensors.

    `packed`: the quantization state of a 4-bit weight, the scales of one that is held in 8 bits, else None; `fp8`: the
    products are of 8 bits; of 65536 draws `dropped` are not kept.
    """

    packed: Any = None
    fp8: bool = False
    has_lora: bool = False
    scaling: float = 0.0
    dropped: int = 0


_Read = tuple[_Layer, tuple[Tensor | None, ...]]


def linears(x: Tensor, modules: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the outputs of frozen linear layers, with LoRA or without, that are fed the same x.

    x is [..., in], an output [..., out of that layer]. All layers have one gradient of x together. Where a layer's own
    forward must compute (several adapters, a merged one, a rank beyond the kernels' tiles), all of them do.
    """
    read = [found for module in modules if (found := _read(module, x)) is not None]
    if len(read) < len(modules):
        return tuple(module(x) for module in modules)
    return _compute(x, read)


def lora_linear(module: Any, x: Tensor) -> Any:
    """Compute base(x) + scaling * up(down(dropout(x))), PEFT's forward of a linear layer with one adapter.

    x is [..., in]; NotImplemented where the module's own forward must compute.
    """
    found = _read(module, x)
    return NotImplemented if found is None else _compute(x, [found])[0]


def _read(module: Any, x: Tensor) -> _Read | None:
    """A layer's facts and (weight, bias, down, up, row keys); None where its own forward must do it.

    What a module holds is read where PyTorch keeps it: its look-up by name is in Python, and this is called hundreds
    of times a micro-batch.
    """
    if not isinstance(module, LoraLayer):
        own = module._parameters
        plain = _Layer(quantization_of(module), is_fp8(module))
        return plain, (own["weight"], own.get("bias"), None, None, None)
    layer: Any = module
    parts = layer._modules
    base, downs = parts["base_layer"], parts["lora_A"]._modules
    if not _takes_lora(layer, base, downs):
        return None
    (adapter,) = downs
    if layer.disable_adapters or layer.merged or layer.active_adapters != [adapter]:
        return None
    rows, dropped = None, 0
    dropout = parts["lora_dropout"]._modules[adapter]
    if isinstance(dropout, SampleDropout) and dropout.training and dropout.dropped:
        rows, dropped = dropout.rows_of(x), dropout.dropped
    facts = _Layer(quantization_of(base), is_fp8(base), True, layer.scaling[adapter], dropped)
    down, up = downs[adapter], parts["lora_B"]._modules[adapter]
    own = base._parameters
    return facts, (
        own["weight"],
        own.get("bias"),
        down._parameters["weight"],
        up._parameters["weight"],
        rows,
    )


def _takes_lora(layer: Any, base: Any, downs: Any) -> bool:
    """One plain adapter on a linear layer, of a rank whose tiles fit."""
    plain = len(downs) == 1 and not layer.lora_variant
    return plain and max(layer.r.values(), default=0) <= LARGEST_RANK and isinstance(base, nn.Linear)


def _compute(x: Tensor, read: Sequence[_Read]) -> tuple[Tensor, ...]:
    layers = [layer for layer, _ in read]
    tensors = [tensor for _, group in read for tensor in group]
    with AutocastOff(x):
        return cast(tuple[Tensor, ...], _Linears.apply(x, layers, *tensors))


_TENSORS = 5  # of each layer: weight, bias, down, up, row keys


class _Linears(torch.autograd.Function):
    """Frozen linear layers of one input, and their adapters. Saves x, adapters, scaling * down(dropout(x)), no mask.

    Adapters are fp32; their products are in the dtype of x, as under autocast, their gradients fp32 again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[_Layer], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        saved: list[Tensor | None] = []
        shape, dtype = x.shape, x.dtype
        groups = _groups(tensors)
        flat = x.reshape(-1, shape[-1]).contiguous()
        in_8_bits = quantize_rows(flat) if any(layer.fp8 for layer in layers) else None
        adapters = _adapters(flat, layers, groups)
        inners = iter(project(flat, adapters))
        for layer, (weight, bias, down, up, rows) in zip(layers, groups, strict=True):
            output = _product(flat, in_8_bits, layer, weight, None if bias is None else in_dtype(bias, dtype))
            inner = None
            if layer.has_lora:
                inner = next(inners)
                add_up(output, inner, up)
            outputs.append(output.view(*shape[:-1], -1))
            saved += [weight, inner, down, up, rows]
        ctx.save_for_backward(flat if adapters else None, *saved)
        ctx.layers = layers
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat, *saved = ctx.saved_tensors
        layers, groups = ctx.layers, _groups(saved)
        of_x: Tensor | None = None
        of_inners: list[Tensor] = []
        of_ups: list[Tensor] = []
        with AutocastOff(gradients[0]):
            flats = [each.reshape(-1, each.shape[-1]) for each in gradients]
            for layer, (_, inner, _, up, _), gradient in zip(layers, groups, flats, strict=True):
                if layer.has_lora:
                    of_ups.append(gradient.t().mm(inner).float())
                    of_inners.append(gradient.mm(in_dtype(up, gradient.dtype)))
            adapters = _adapters(flat, layers, groups)
            of_downs = adapter_gradients(flat, of_inners, adapters) if adapters else []
            if ctx.needs_input_grad[0]:
                of_x = _backward_products(flats, layers, [group[0] for group in groups])
                add_back(of_x, of_inners, adapters)
                of_x = of_x.view(*gradients[0].shape[:-1], -1)
        of_adapters = iter(zip(of_downs, of_ups, strict=True))
        of_layers = [next(of_adapters) if layer.has_lora else (None, None) for layer in layers]
        return of_x, None, *(each for pair in of_layers for each in (None, None, *pair, None))


def _product(x: Tensor, in_8_bits: Fp8Rows | None, layer: _Layer, weight: Any, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, [T, out]."""
    if layer.fp8 and in_8_bits is not None:
        return forward_product(in_8_bits, rows_of_weight(weight, layer.packed, x.dtype), bias, x.dtype)
    return linear(x, matrix_of(weight, layer.packed, x.dtype), bias)


def _backward_products(
    gradients: Sequence[Tensor], layers: Sequence[_Layer], weights: Sequence[Any]
) -> Tensor:
    """The sum of gradient @ weight, [T, in]."""
    dtype = gradients[0].dtype
    if all(layer.fp8 for layer in layers):
        rows = [
            rows_of_weight(weight, each.packed, dtype) for weight, each in zip(weights, layers, strict=True)
        ]
        return backward_product(gradients, rows)
    total: Tensor | None = None
    for gradient, layer, weight in zip(gradients, layers, weights, strict=True):
        matrix = matrix_of(weight, layer.packed, dtype)
        total = gradient.mm(matrix) if total is None else total.addmm_(gradient, matrix)
    assert total is not None
    return total


def _groups(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[at : at + _TENSORS] for at in range(0, len(tensors), _TENSORS)]


def _adapters(
    flat: Tensor | None, layers: Sequence[_Layer], groups: Sequence[Sequence[Any]]
) -> list[Adapter]:
    """The adapters of the layers that have one. `groups`: of each, with down, up and row keys at the end."""
    adapters = []
    for layer, (*_, down, _, rows) in zip(layers, groups, strict=True):
        if layer.has_lora and flat is not None:
            adapters.append(Adapter(down, *_mask_of(flat, rows, layer.dropped), layer.scaling))
    return adapters


def _mask_of(flat: Tensor, rows: Tensor | None, dropped: int) -> tuple[Tensor, Tensor, int, float]:
    """Row keys, channel words, share and scale as the kernels take them; without dropout nothing is read."""
    if rows is None:
        return flat, flat, 0, 1.0
    words = channel_words((flat.shape[1] + 1) // 2, flat.device)
    return rows, words, dropped, DRAWS / (DRAWS - dropped)
