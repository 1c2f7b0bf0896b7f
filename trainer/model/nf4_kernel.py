"""A Triton kernel that takes a weight out of its 4 bits (NF4) in one pass, with the numbers of bitsandbytes.

bitsandbytes 0.50 takes four launches for a weight whose scales are quantized too (double quantization): the scales out
of their 8 bits, their mean added, the weight, and a conversion of what it made.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv

_BYTES, _WARPS = 1024, 4  # of a program


@DirectLaunch
@triton.jit
def _dequantize(
    packed,
    scales,
    table,
    scales_of_scales,
    table_of_scales,
    mean,
    out,
    count,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTER: tl.constexpr,
    BYTES: tl.constexpr,
):
    """out [2 * count] of packed [count] bytes: the upper half of a byte is the earlier value.

    BLOCK: bytes with one scale; OUTER: scales with one scale of their own. Without fused multiplication and addition,
    as bitsandbytes, which adds the mean in a kernel of its own.
    """
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    byte = tl.load(packed + at, mask=at < count, other=0).to(tl.int32)
    block = first // BLOCK + tl.arange(0, BYTES // BLOCK)
    there = block * BLOCK < count
    if NESTED:
        number = tl.load(scales + block, mask=there, other=0).to(tl.int32)
        outer = tl.load(scales_of_scales + block // OUTER, mask=there, other=0.0)
        scale = tl.load(table_of_scales + number) * outer + tl.load(mean)
    else:
        scale = tl.load(scales + block, mask=there, other=0.0)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], (BYTES // BLOCK, BLOCK)), (BYTES,))
    earlier = tl.load(table + (byte >> 4)) * scale
    later = tl.load(table + (byte & 15)) * scale
    values = tl.interleave(earlier, later).to(out.dtype.element_ty)
    place = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + place, values, mask=place < 2 * count)


def can_dequantize(state: Any) -> bool:
    """Return whether the kernel takes weights of such a state (`bitsandbytes.functional.QuantState`)."""
    return bool(
        state.quant_type == "nf4"
        and state.blocksize in (64, 128, 256)
        and (not state.nested or state.absmax.dtype == torch.uint8)
        and math.prod(state.shape) % 2 == 0
    )


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """Return the weight [out, in] in the dtype that was quantized from; to the bit as bitsandbytes' `dequantize_4bit`.

    `packed`: its 4-bit values, two a byte, in whatever dtype they are stored.
    """
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    count, nested, second = out.numel() // 2, bool(state.nested), state.state2
    _dequantize[(cdiv(count, _BYTES),)](
        packed.view(-1).view(torch.uint8),
        state.absmax,
        state.code,
        second.absmax if nested else None,
        second.code if nested else None,
        state.offset if nested else None,
        out,
        count,
        nested,
        state.blocksize // 2,
        second.blocksize if nested else 1,
        _BYTES,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return out
