"""4-bit weights held dequantized: the numbers of QLoRA without dequantizing in every pass, where memory allows."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

MANY_ROWS = 1536
"""Above it bitsandbytes 0.50 dequantizes a weight and multiplies as PyTorch does (`_gemm_4bit_custom_max_m`)."""


def dequantize_weights(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace every 4-bit linear layer by a plain one of the same values in `dtype`; returns the bytes they take.

    `dtype`: of the products. bitsandbytes dequantizes to the dtype that was quantized from, then converts, in each
    forward and backward (`MatMul4Bit`, 0.50): so the products are the same. One layer at a time, so that no more
    than one is there twice.
    """
    taken = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                plain = _dequantized(child, dtype)
                taken += plain.weight.nbytes
                setattr(parent, name, plain)
    return taken


def _dequantized(layer: Linear4bit, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    plain.weight = nn.Parameter(values, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return plain


def quantization_of(base: Any) -> Any:
    """Return the quantization state of a 4-bit layer, the scales of one of 8 bits, else None.

    FSDP2's gathered weight has lost it, the module has it.
    """
    of_weight = getattr(base.weight, "quant_state", None)
    if of_weight is not None:
        return of_weight
    # Not `getattr`: what a module lacks is an error with a message, and this is asked of every layer in every pass.
    return base.__dict__.get("quant_state", base._buffers.get("quant_state"))


def matrix_of(weight: Tensor, packed: Any, dtype: torch.dtype) -> Tensor:
    """Return the base's weight [out, in] in `dtype`, out of its 4 bits where it is packed, as `MatMul4Bit` does."""
    if packed is None:
        return in_dtype(weight, dtype)
    kernel = _kernel() if weight.is_cuda else None
    if kernel is not None and kernel.can_dequantize(packed):
        return in_dtype(kernel.dequantize(weight, packed), dtype)
    return dequantize_4bit(weight.view(-1, 1), packed).to(dtype)


@cache
def _kernel() -> Any:
    """`trainer.model.nf4_kernel`, in a quarter of the launches and the same bits; None without Triton."""
    return import_module("trainer.model.nf4_kernel") if find_spec("triton") else None


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor.to(dtype)`, without the call where there is nothing to do: it is asked in every product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
