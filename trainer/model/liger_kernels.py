"""Liger 0.8.5's kernels for RMSNorm forward and rotary positions, launched by `DirectLaunch` with its own settings.

Its functions around them take longer than the launch: they look up the device and the kernels' sizes in every call.
Its patch for Qwen2-VL does not import with transformers 5.23.
"""

from __future__ import annotations

import torch
from liger_kernel.ops.fused_add_rms_norm import _fused_add_rms_norm_forward_kernel
from liger_kernel.ops.rms_norm import _rms_norm_forward_kernel, rms_norm_forward
from liger_kernel.ops.rope import _triton_rope
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, next_power_of_2

_norm = DirectLaunch(_rms_norm_forward_kernel)
_norm_of_sum = DirectLaunch(_fused_add_rms_norm_forward_kernel)
_rotate = DirectLaunch(_triton_rope)
_LLAMA = 0  # the casting mode: statistics in fp32, the product with the weight in the dtype of the input


def norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return (RMSNorm of x [..., channels], deviations fp32 [rows]): one over the root of a row's mean square."""
    x = x.contiguous()
    channels = x.shape[-1]
    if channels <= 256:  # of a head: Liger has another kernel for many short rows
        normed, _, deviations, *_ = rms_norm_forward(x, weight, epsilon, 0.0, "llama", None)
        return normed, deviations
    rows = x.numel() // channels
    normed, deviations = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    block = next_power_of_2(channels)
    _norm[(rows,)](
        *(normed, channels, x, channels, weight, 1, deviations, 1, channels, epsilon, 0.0),
        *(_LLAMA, True, block),
        num_warps=_warps(block),
    )
    return normed, deviations


def norm_of_sum_forward(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (RMSNorm of x + residual, x + residual, deviations fp32 [rows]); x and residual are [..., channels]."""
    x, residual = x.contiguous(), residual.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // channels
    normed, total, deviations = (
        torch.empty_like(x),
        torch.empty_like(x),
        x.new_empty(rows, dtype=torch.float32),
    )
    block = next_power_of_2(channels)
    _norm_of_sum[(rows,)](
        *(normed, channels, total, channels, x, channels, residual, channels, weight, 1, deviations, 1),
        *(channels, epsilon, 0.0, _LLAMA, block),
        num_warps=_warps(block),
        num_stages=2,
    )
    return normed, total, deviations


def rotate_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Turn query [T, heads, head_dim] and key [T, kv_heads, head_dim], both contiguous, by their rotary positions.

    cos and sin [1, T, head_dim] are those of the tokens; `back`: turn gradients back.
    """
    tokens, heads, width = query.shape
    key_heads = key.shape[1]
    cos, sin = cos.contiguous(), sin.contiguous()
    padded = [next_power_of_2(size) for size in (heads, key_heads, width, width)]
    _rotate[(tokens,)](
        *(query, heads * width, key, key_heads * width, cos, width, sin, width, tokens),
        *(1, 1, heads, key_heads, width, *padded, width, max(padded[:2]), back),
    )


def _warps(block: int) -> int:
    """As Liger has it for a row of so many numbers (`calculate_settings`)."""
    return 32 if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4
