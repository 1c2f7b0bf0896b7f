"""4-bit weights held dequantized: the numbers of QLoRA without dequantizing in every pass, where memory allows."""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn


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
