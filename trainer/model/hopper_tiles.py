"""What the attention kernels for Hopper share, in Gluon: Triton's language one level down, where products need no wait.

A tile of keys comes through the card's copy engine, which needs no address of a thread, into one of S places in
shared memory; a barrier in shared memory says that it is there. Gluon is experimental (`triton.experimental`): two
names differ between Triton 3.6 and 3.8, which are both meant here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

every_warp = getattr(gl, "barrier", None) or gl.thread_barrier
"""Wait until all warps of the program are here."""
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def fetch(descriptor, places, bars, number, begin, column, there, S: gl.constexpr):
    """Let the copy engine bring tile `number` of the rows from `begin` on, where it is `there`."""
    slot, rows = number % S, descriptor.block_type.shape[0]
    mbarrier.expect(bars.index(slot), descriptor.block_type.nbytes, pred=there)
    load(descriptor, [begin + number * rows, column], bars.index(slot), places.index(slot), pred=there)


@gluon.jit
def arrived(bars, number, there, S: gl.constexpr):
    """Wait for tile `number`, where it is `there`."""
    mbarrier.wait(bars.index(number % S), (number // S) & 1, pred=there)


@gluon.jit
def product(rows, places, number, zero, S: gl.constexpr):
    """Begin rows [M, D] @ (tile `number` [N, D]).T; `zero` [M, N] has the layout."""
    columns = places.index(number % S).permute((1, 0))
    return warpgroup_mma(rows, columns, zero, use_acc=False, is_async=True)


@gluon.jit
def soften(scores, largest, total, scale):
    """One step of the running softmax; scores [M, N] in powers of 2 once they are scaled."""
    higher = gl.maximum(largest, gl.max(scores, axis=1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    kept = gl.exp2(largest - higher)
    return higher, weights, kept, total * kept + gl.sum(weights, axis=1)


@gluon.jit
def as_rows(weights, like):
    """The left side of a product that is added to `like`."""
    return gl.convert_layout(weights, gl.DotOperandLayout(0, like.type.layout, 2))


@gluon.jit
def times_rows(x, factor):
    """x [M, N] * factor [M]."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


def tiles(x: Tensor, rows: int, columns: Sequence[int]) -> list[TensorDescriptor]:
    """Describe x [rows, heads, channels], whose channels lie head after head, to the copy engine.

    In tiles of `rows` rows and as many columns as each of `columns` says. The rows are a multiple of 16 bytes apart.
    """
    shape, strides = [len(x), x.shape[1] * x.shape[2]], [x.stride(0), 1]
    return [
        TensorDescriptor(x, shape, strides, [rows, each], _layout(rows, each, x.dtype)) for each in columns
    ]


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
