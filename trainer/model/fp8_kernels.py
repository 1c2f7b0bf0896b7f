"""Triton kernels around 8-bit products: they quantize rows to e4m3, one scale a row, and transpose an 8-bit matrix.

Scale and rounding are those of `trainer.model.fp8`: a row's scale is its largest magnitude (at least 1e-12) / 448, in
fp32; values are clamped to [-448, 448] and rounded to nearest, ties to even. Both divisions are IEEE ones
(`tl.div_rn`), so that a GPU and the CPU's reference have the same scales.

A row is quantized in the pass that computes it where there is one (norm, SwiGLU and its gradient). What is quantized is
first rounded to the dtype of the activations, so that the 8-bit numbers are those of the passes one after another.
All matrices are row-major; kernels take each row in one program, whose sums have one order on every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernel_launch import DirectLaunch, cdiv, next_power_of_2

_GRADIENT_TILE = 1, 1024  # rows and columns


@triton.jit
def _part(x, factors, row, begin, columns, SCALED: tl.constexpr, C: tl.constexpr):
    """C numbers of a row of x [rows, columns] from `begin` on, times their factors; zeros behind its end."""
    column = begin + tl.arange(0, C)
    there = column < columns
    wide = tl.load(x + row * columns + column, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        wide *= tl.load(factors + column, mask=there, other=0.0)
    return wide


@triton.jit
def _scale_of(most, scales, row):
    """What a row is multiplied by whose largest magnitude is `most`; its scale is stored."""
    most = tl.maximum(most, 1e-12)
    tl.store(scales + row, tl.div_rn(most, 448.0))
    return tl.div_rn(448.0, most)


@triton.jit
def _store_e4m3(values, at, wide, factor, there):
    """Store wide * factor as e4m3, clamped to its range: a number beyond it would become NaN."""
    wide = tl.minimum(tl.maximum(wide * factor, -448.0), 448.0)
    tl.store(values + at, wide.to(tl.float8e4nv), mask=there)


@DirectLaunch
@triton.jit
def _quantize_whole(x, factors, values, scales, columns, SCALED: tl.constexpr, C: tl.constexpr):
    """As `_quantize`, for rows of x alone that a tile holds: they are read once."""
    row = tl.program_id(0).to(tl.int64)
    wide = _part(x, factors, row, 0, columns, SCALED, C)
    factor = _scale_of(tl.max(tl.abs(wide), axis=0), scales, row)
    column = tl.arange(0, C)
    _store_e4m3(values, row * columns + column, wide, factor, column < columns)


@DirectLaunch
@triton.jit
def _quantize(
    x,
    y,
    z,
    x_factors,
    y_factors,
    z_factors,
    values,
    scales,
    x_columns,
    y_columns,
    z_columns,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
):
    """values [rows, columns] e4m3 and scales [rows] of x, y and z (PARTS of them) side by side; a row a program.

    Every row is read twice, the second time out of the card's cache.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((C,), dtype=tl.float32)
    for begin in range(0, x_columns, C):
        largest = tl.maximum(largest, tl.abs(_part(x, x_factors, row, begin, x_columns, SCALED, C)))
    if PARTS > 1:
        for begin in range(0, y_columns, C):
            largest = tl.maximum(largest, tl.abs(_part(y, y_factors, row, begin, y_columns, SCALED, C)))
    if PARTS > 2:
        for begin in range(0, z_columns, C):
            largest = tl.maximum(largest, tl.abs(_part(z, z_factors, row, begin, z_columns, SCALED, C)))
    factor = _scale_of(tl.max(largest, axis=0), scales, row)
    columns = x_columns
    if PARTS > 1:
        columns += y_columns
    if PARTS > 2:
        columns += z_columns
    column = tl.arange(0, C)
    at = row * columns + column
    for begin in range(0, x_columns, C):
        wide = _part(x, x_factors, row, begin, x_columns, SCALED, C)
        _store_e4m3(values, at + begin, wide, factor, begin + column < x_columns)
    at += x_columns
    if PARTS > 1:
        for begin in range(0, y_columns, C):
            wide = _part(y, y_factors, row, begin, y_columns, SCALED, C)
            _store_e4m3(values, at + begin, wide, factor, begin + column < y_columns)
        at += y_columns
    if PARTS > 2:
        for begin in range(0, z_columns, C):
            wide = _part(z, z_factors, row, begin, z_columns, SCALED, C)
            _store_e4m3(values, at + begin, wide, factor, begin + column < z_columns)


@triton.jit
def _activated(gate, up, at, there):
    """silu(gate) * up, rounded as Liger's SwiGLU rounds it."""
    value = tl.load(gate + at, mask=there, other=0.0)
    factor = tl.load(up + at, mask=there, other=0.0)
    wide = value.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(factor.dtype)
    return (silu.to(tl.float32) * factor.to(tl.float32)).to(factor.dtype).to(tl.float32)


@DirectLaunch
@triton.jit
def _swiglu(gate, up, values, scales, columns, C: tl.constexpr):
    """values [rows, columns] e4m3 and scales [rows] of silu(gate) * up; a row a program, read twice."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    largest = tl.zeros((C,), dtype=tl.float32)
    for begin in range(0, columns, C):
        there = begin + column < columns
        largest = tl.maximum(largest, tl.abs(_activated(gate, up, row * columns + begin + column, there)))
    factor = _scale_of(tl.max(largest, axis=0), scales, row)
    for begin in range(0, columns, C):
        there = begin + column < columns
        at = row * columns + begin + column
        _store_e4m3(values, at, _activated(gate, up, at, there), factor, there)


@triton.jit
def _gradients(gradient, gate, up, at, there):
    """What silu(gate) * up passes back to gate and to up, rounded as Liger's SwiGLU rounds it."""
    value = tl.load(gate + at, mask=there, other=0.0)
    wide = value.to(tl.float32)
    factor = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    back = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    silu = wide * sigmoid
    of_gate = back * (silu * (1 - sigmoid) + sigmoid) * factor
    of_up = back * silu
    return of_gate.to(value.dtype).to(tl.float32), of_up.to(value.dtype).to(tl.float32)


@triton.jit
def _scaled_gradients(gradient, gate, up, of_gate, of_up, row, column, columns, inside):
    """`_gradients` of a tile, times the factors of its columns, which its rows share."""
    there = column < columns
    both = inside[:, None] & there[None, :]
    first, second = _gradients(gradient, gate, up, row[:, None] * columns + column[None, :], both)
    first *= tl.load(of_gate + column, mask=there, other=0.0)[None, :]
    second *= tl.load(of_up + column, mask=there, other=0.0)[None, :]
    return first, second, both


@DirectLaunch
@triton.jit(do_not_specialize=["rows"])
def _swiglu_gradient(
    gradient, gate, up, of_gate, of_up, values, scales, rows, columns, R: tl.constexpr, C: tl.constexpr
):
    """values [rows, 2 * columns] e4m3 and scales [rows]: gradients of gate and up side by side, times their factors.

    R rows a program: the factors, of fp32, are as much to read as two rows.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    tile = tl.arange(0, C)
    largest = tl.zeros((R, C), dtype=tl.float32)
    for begin in range(0, columns, C):
        first, second, _ = _scaled_gradients(
            gradient, gate, up, of_gate, of_up, row, begin + tile, columns, inside
        )
        largest = tl.maximum(largest, tl.maximum(tl.abs(first), tl.abs(second)))
    most = tl.maximum(tl.max(largest, axis=1), 1e-12)
    tl.store(scales + row, tl.div_rn(most, 448.0), mask=inside)
    factor = tl.div_rn(448.0, most)[:, None]
    for begin in range(0, columns, C):
        first, second, both = _scaled_gradients(
            gradient, gate, up, of_gate, of_up, row, begin + tile, columns, inside
        )
        at = row[:, None] * (columns * 2) + (begin + tile)[None, :]
        _store_e4m3(values, at, first, factor, both)
        _store_e4m3(values, at + columns, second, factor, both)


@DirectLaunch
@triton.jit
def _norm_of_sum(x, residual, weight, total, values, scales, deviations, columns, epsilon, C: tl.constexpr):
    """total = x + residual, and values e4m3, scales [rows] of its RMSNorm, rounded as Liger's is; a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    there = column < columns
    at = row * columns + column
    one = tl.load(x + at, mask=there, other=0.0)
    both = (one.to(tl.float32) + tl.load(residual + at, mask=there, other=0.0).to(tl.float32)).to(one.dtype)
    tl.store(total + at, both, mask=there)
    wide = both.to(tl.float32)
    deviation = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + epsilon)
    tl.store(deviations + row, deviation)
    scaled = (wide * deviation).to(one.dtype).to(tl.float32)
    scaled *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    scaled = scaled.to(one.dtype).to(tl.float32)
    factor = _scale_of(tl.max(tl.abs(scaled), axis=0), scales, row)
    _store_e4m3(values, at, scaled, factor, there)


@DirectLaunch
@triton.jit
def _transpose(x, out, rows, columns, stride, R: tl.constexpr, C: tl.constexpr):
    """out [columns, rows], whose rows begin `stride` apart, of x [rows, columns]."""
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0)
    at = column[:, None].to(tl.int64) * stride + row[None, :]
    tl.store(out + at, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])


def _empty_rows(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return values, torch.empty(rows, 1, dtype=torch.float32, device=device)


def _tile(columns: int) -> int:
    return min(4096, next_power_of_2(columns))


def quantize_rows(parts: Sequence[Tensor], factors: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return (values e4m3 [rows, all columns], scales fp32 [rows, 1]) of up to three matrices side by side.

    `factors`: of the columns of each, fp32 [columns]; see `trainer.model.fp8.quantize_rows`.
    """
    parts = [part.contiguous() for part in parts]
    widths = [part.shape[1] for part in parts]
    values, scales = _empty_rows(len(parts[0]), sum(widths), parts[0].device)
    missing = 3 - len(parts)
    scaled = parts if factors is None else list(factors)
    block = _tile(max(widths))
    warps = max(1, block // 512)
    if len(parts) == 1 and widths[0] <= block:
        _quantize_whole[(len(values),)](
            parts[0], scaled[0], values, scales, widths[0], factors is not None, block, num_warps=warps
        )
        return values, scales
    _quantize[(len(values),)](
        *parts,
        *parts[:1] * missing,
        *scaled,
        *scaled[:1] * missing,
        values,
        scales,
        *widths,
        *[0] * missing,
        len(parts),
        factors is not None,
        block,
        num_warps=warps,
    )
    return values, scales


def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values e4m3, scales fp32 [rows, 1]) of silu(gate) * up; gate, up and values are [rows, columns]."""
    gate, up = gate.contiguous(), up.contiguous()
    rows, columns = gate.shape
    values, scales = _empty_rows(rows, columns, gate.device)
    block = _tile(columns)
    _swiglu[(rows,)](gate, up, values, scales, columns, block, num_warps=max(1, block // 256))
    return values, scales


def swiglu_gradient(
    gradient: Tensor, gate: Tensor, up: Tensor, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (values e4m3 [rows, 2 * columns], scales fp32 [rows, 1]) of the gradients of gate and up side by side.

    `gradient`: [rows, columns], of silu(gate) * up. `factors`: fp32 [columns] each, by which the two gradients are
    multiplied before they are quantized (`trainer.model.fp8.scales_of`).
    """
    rows, columns = gate.shape
    values, scales = _empty_rows(rows, 2 * columns, gate.device)
    block = min(_GRADIENT_TILE[1], _tile(columns))
    _swiglu_gradient[(cdiv(rows, _GRADIENT_TILE[0]),)](
        gradient.contiguous(),
        gate.contiguous(),
        up.contiguous(),
        *factors,
        values,
        scales,
        rows,
        columns,
        _GRADIENT_TILE[0],
        block,
        num_warps=4,
    )
    return values, scales


def norm_of_sum(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x + residual, its RMSNorm's e4m3 values, their scales fp32 [rows, 1], deviations fp32 [rows]).

    x, residual, their sum and the values are [rows, columns]; `weight` [columns] is the norm's. A deviation is
    1 / sqrt(mean of squares + epsilon) of a row, which the norm's backward needs.
    """
    x = x.contiguous()
    rows, columns = x.shape
    total = torch.empty_like(x)
    values, scales = _empty_rows(rows, columns, x.device)
    deviations = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(columns)
    _norm_of_sum[(rows,)](
        x,
        residual.contiguous(),
        weight,
        total,
        values,
        scales,
        deviations,
        columns,
        epsilon,
        block,
        num_warps=max(1, min(16, block // 512)),
    )
    return total, values, scales, deviations


def transposed(parts: Sequence[Tensor]) -> Tensor:
    """Return matrices [rows, columns] of 8 bits, one below the other, transposed: [columns, all rows], contiguous.

    `torch._scaled_mm` takes its second matrix column-major only.
    """
    columns = parts[0].shape[1]
    total = sum(len(part) for part in parts)
    out = torch.empty(columns, total, dtype=parts[0].dtype, device=parts[0].device)
    begin = 0
    for part in parts:
        rows = len(part)
        grid = (cdiv(rows, 128), cdiv(columns, 128))
        target = out.view(torch.uint8)[:, begin:]
        _transpose[grid](part.view(torch.uint8), target, rows, columns, total, 128, 128, num_warps=8)
        begin += rows
    return out
