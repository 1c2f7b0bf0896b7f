"""Triton kernels around 8-bit products: rows to e4m3 with a scale each, and an 8-bit matrix turned over."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantize(x, factors, values, scales, columns, SCALED: tl.constexpr, C: tl.constexpr):
    """values [rows, columns] e4m3 and scales [rows] of x [rows, columns]; a row a program, read twice."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((C,), dtype=tl.float32)
    for begin in range(0, columns, C):
        column = begin + tl.arange(0, C)
        there = column < columns
        wide = tl.load(x + row * columns + column, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            wide *= tl.load(factors + column, mask=there, other=0.0)
        largest = tl.maximum(largest, tl.abs(wide))
    most = tl.maximum(tl.max(largest, axis=0), 1e-12)
    factor = tl.div_rn(448.0, most)
    tl.store(scales + row, tl.div_rn(most, 448.0))
    for begin in range(0, columns, C):
        column = begin + tl.arange(0, C)
        there = column < columns
        wide = tl.load(x + row * columns + column, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            wide *= tl.load(factors + column, mask=there, other=0.0)
        wide = tl.minimum(tl.maximum(wide * factor, -448.0), 448.0)
        tl.store(values + row * columns + column, wide.to(tl.float8e4nv), mask=there)


@triton.jit
def _transpose(x, out, rows, columns, R: tl.constexpr, C: tl.constexpr):
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0)
    at = column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out + at, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])


def quantize_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """(values e4m3, scales fp32 [rows, 1]) of x [rows, columns] times `factors` [columns]; see `trainer.model.fp8`."""
    x = x.contiguous()
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(columns))
    _quantize[(rows,)](
        x,
        x if factors is None else factors,
        values,
        scales,
        columns,
        factors is not None,
        block,
        num_warps=max(1, block // 512),
    )
    return values, scales


def transposed(x: Tensor) -> Tensor:
    """x [rows, columns] of 8 bits as [columns, rows], contiguous."""
    rows, columns = x.shape
    out = torch.empty(columns, rows, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose[grid](x.view(torch.uint8), out.view(torch.uint8), rows, columns, 128, 128, num_warps=8)
    return out
