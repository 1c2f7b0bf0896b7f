"""The language model's attention on Hopper (H100, H200), in Gluon (`trainer.model.hopper_tiles`).

As `trainer.model.text_attention_kernel`, whose numbers and promises these have, with two differences. The query heads
that share a head of keys are rows of one tile, so each key is read once for all of them; and the products of one tile
run beside the softmax of another (`trainer.model.hopper_tower_attention`).

G query heads to a head of keys, D channels; row r of a sample is token r // G, head r % G of its group. Tensors are
[tokens, heads, D], row-major; descriptors of keys, values, or of all heads are of [tokens, their heads * D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trainer.model.hopper_tiles import arrived, as_rows, every_warp, fetch, product, soften, tiles, times_rows
from trainer.model.kernel_launch import DirectLaunch, cdiv

_LOG2E = gl.constexpr(1.4426950408889634)  # the kernels' powers are of 2

FORWARD = {"M": 64, "N": 64, "S": 2, "num_warps": 4}
OF_QUERIES = {"M": 64, "N": 64, "S": 2, "num_warps": 4}
OF_KEYS = {"M": 64, "N": 64, "S": 2, "num_warps": 4}
_BEYOND = 128  # numbers that `of_keys` may read beyond the end of a row's sums

_any_length = gluon.jit(do_not_specialize=["samples", "tokens"])


@gluon.jit
def _sample(bounds, samples, tile, rows_of_token: gl.constexpr, size: gl.constexpr):
    """(begin, end) of the sample that a tile of `size` rows lies in, and the tile's number within it."""
    sample, first, ended = 0, 0, 0
    for i in range(samples):
        length = gl.load(bounds + i + 1) - gl.load(bounds + i)
        ended += (length * rows_of_token + size - 1) // size
        sample = gl.where(tile >= ended, i + 1, sample)
        first = gl.where(tile >= ended, ended, first)
    return gl.load(bounds + sample), gl.load(bounds + sample + 1), tile - first


@gluon.jit
def _places(descriptor, S: gl.constexpr):
    """S places for tiles, and a barrier for each."""
    shape: gl.constexpr = descriptor.block_type.shape
    places = gl.allocate_shared_memory(descriptor.dtype, [S, shape[0], shape[1]], descriptor.layout)
    bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(S):
        mbarrier.init(bars.index(slot), count=1)
    return places, bars


@gluon.jit
def _shared(x, at, inside, rows: gl.constexpr, D: gl.constexpr):
    """[rows, D] of x in shared memory, zeros where not `inside`."""
    dtype: gl.constexpr = x.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, D], dtype)
    return gl.allocate_shared_memory(dtype, [rows, D], layout, gl.load(x + at, mask=inside, other=0.0))


@gluon.jit
def _packed(
    begin,
    end,
    first_row,
    heads,
    key_head,
    layout: gl.constexpr,
    M: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
):
    """Offsets [M, D] of packed rows from `first_row` on, and which of them are of the sample."""
    row = first_row + gl.arange(0, M, gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, gl.SliceLayout(0, layout))
    place = (begin + row // G).to(gl.int64) * heads + key_head * G + row % G
    return place[:, None] * D + channel[None, :], (row // G < end - begin)[:, None]


@DirectLaunch
@_any_length
def _forward(
    q, k_d, v_d, out, sums, bounds, tokens, samples, heads, scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, G: gl.constexpr, S: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out like q [tokens, heads, D]; sums fp32 [heads, tokens]: logarithms (of 2) of the softmax's denominators."""
    key_head = gl.program_id(1)
    begin, end, tile = _sample(bounds, samples, gl.program_id(0), G, M)
    first_row, column = tile * M, key_head * D
    first_token = first_row // G
    count = gl.minimum((first_row + M - 1) // G, end - begin - 1) // N + 1
    scale *= _LOG2E
    dtype: gl.constexpr = k_d.dtype
    keys, k_bars = _places(k_d, S)
    values, v_bars = _places(v_d, S)
    fence_async_shared()
    every_warp()
    for i in gl.static_range(S):
        fetch(k_d, keys, k_bars, i, begin, column, i < count, S)
        fetch(v_d, values, v_bars, i, begin, column, i < count, S)
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [num_warps, 1], [1, 0])
    at, inside = _packed(begin, end, first_row, heads, key_head, loaded, M, G, D)
    queries = _shared(q, at, inside, M, D)
    fence_async_shared()
    every_warp()
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    of_sum: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    zero = gl.zeros([M, N], gl.float32, of_scores)
    largest = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, of_scores))
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, of_scores))
    kept_sum = gl.zeros([M, D], gl.float32, of_sum)
    row = first_row + gl.arange(0, M, gl.SliceLayout(1, of_scores))
    token = (row // G)[:, None]
    key = gl.arange(0, N, gl.SliceLayout(0, of_scores))[None, :]
    arrived(k_bars, 0, True, S)
    scores = warpgroup_mma_wait(0, deps=(product(queries, keys, 0, zero, S),))
    scores = gl.where(key <= token, scores, float("-inf"))
    largest, softened, kept, total = soften(scores, largest, total, scale)
    weights = softened.to(dtype)
    every_warp()  # has the scores of tile 0: its keys' place is free
    fetch(k_d, keys, k_bars, S, begin, column, count > S, S)
    arrived(v_bars, 0, True, S)
    arrived(k_bars, 1, count > 1, S)
    for number in range(count - 1):
        following = product(queries, keys, number + 1, zero, S)
        summing = warpgroup_mma(as_rows(weights, kept_sum), values.index(number % S), kept_sum, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(following,))
        if (number + 2) * N > first_token + 1:
            scores = gl.where(key + (number + 1) * N <= token, scores, float("-inf"))
        largest, softened, kept, total = soften(scores, largest, total, scale)
        # Waited for at this place because it branches: else ptxas puts the wait for the sums before the softmax.
        arrived(v_bars, number + 1, True, S)
        arrived(k_bars, number + 2, number + 2 < count, S)
        kept_sum = warpgroup_mma_wait(0, deps=(summing,))
        every_warp()  # needs neither these values nor the keys of the scores any more
        ahead = number + S
        fetch(v_d, values, v_bars, ahead, begin, column, ahead < count, S)
        fetch(k_d, keys, k_bars, ahead + 1, begin, column, ahead + 1 < count, S)
        kept_sum = times_rows(kept_sum, kept)
        weights = softened.to(dtype)
    summing = warpgroup_mma(
        as_rows(weights, kept_sum), values.index((count - 1) % S), kept_sum, is_async=True
    )
    kept_sum = times_rows(warpgroup_mma_wait(0, deps=(summing,)), 1 / total)
    gl.store(out + at, gl.convert_layout(kept_sum.to(dtype), loaded), mask=inside)
    place = (key_head * G + row % G).to(gl.int64) * tokens + begin + row // G
    gl.store(sums + place, largest + gl.log2(total), mask=row // G < end - begin)


@DirectLaunch
@_any_length
def _of_queries(
    q, gradient, k_d, v_d, sums, along, of_q, bounds, tokens, samples, heads, scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, G: gl.constexpr, S: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Gradients of M packed queries: the products of the next tile of keys run beside the softmax of this one."""
    key_head = gl.program_id(1)
    begin, end, tile = _sample(bounds, samples, gl.program_id(0), G, M)
    first_row, column = tile * M, key_head * D
    first_token = first_row // G
    count = gl.minimum((first_row + M - 1) // G, end - begin - 1) // N + 1
    dtype: gl.constexpr = k_d.dtype
    keys, k_bars = _places(k_d, S)
    values, v_bars = _places(v_d, S)
    fence_async_shared()
    every_warp()
    for i in gl.static_range(S):
        fetch(k_d, keys, k_bars, i, begin, column, i < count, S)
        fetch(v_d, values, v_bars, i, begin, column, i < count, S)
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [num_warps, 1], [1, 0])
    at, inside = _packed(begin, end, first_row, heads, key_head, loaded, M, G, D)
    queries, back = _shared(q, at, inside, M, D), _shared(gradient, at, inside, M, D)
    fence_async_shared()
    every_warp()
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, N, 16])
    of_sum: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    zero = gl.zeros([M, N], gl.float32, of_scores)
    row = first_row + gl.arange(0, M, gl.SliceLayout(1, of_scores))
    token, place = (row // G)[:, None], (key_head * G + row % G).to(gl.int64) * tokens + begin + row // G
    logarithm = gl.load(sums + place, mask=row // G < end - begin, other=float("inf"))[:, None]
    along_row = gl.load(along + place, mask=row // G < end - begin, other=0.0)[:, None]
    key = gl.arange(0, N, gl.SliceLayout(0, of_scores))[None, :]
    query_sum = gl.zeros([M, D], gl.float32, of_sum)
    arrived(k_bars, 0, True, S)
    arrived(v_bars, 0, True, S)
    started = product(queries, keys, 0, zero, S), product(back, values, 0, zero, S)
    scores, change = warpgroup_mma_wait(0, deps=started)
    every_warp()  # has the products of tile 0: its values' place is free
    fetch(v_d, values, v_bars, S, begin, column, count > S, S)
    arrived(k_bars, 1, count > 1, S)
    arrived(v_bars, 1, count > 1, S)
    for number in range(count - 1):
        next_scores = product(queries, keys, number + 1, zero, S)
        next_change = product(back, values, number + 1, zero, S)
        weights = gl.exp2(scores * (scale * _LOG2E) - logarithm)
        if (number + 1) * N > first_token + 1:
            weights = gl.where(key + number * N <= token, weights, 0.0)
        both = (weights * (change - along_row)).to(dtype)
        arrived(
            k_bars, number + 1, True, S
        )  # they are: the branch keeps ptxas from waiting for products before it
        summing = warpgroup_mma(as_rows(both, query_sum), keys.index(number % S), query_sum, is_async=True)
        scores, change, query_sum = warpgroup_mma_wait(0, deps=(next_scores, next_change, summing))
        every_warp()  # needs neither these keys nor the values of the next tile any more
        ahead = number + S
        fetch(k_d, keys, k_bars, ahead, begin, column, ahead < count, S)
        fetch(v_d, values, v_bars, ahead + 1, begin, column, ahead + 1 < count, S)
        arrived(v_bars, number + 2, number + 2 < count, S)
        arrived(k_bars, number + 2, number + 2 < count, S)
    weights = gl.exp2(scores * (scale * _LOG2E) - logarithm)
    weights = gl.where(key + (count - 1) * N <= token, weights, 0.0)
    both = (weights * (change - along_row)).to(dtype)
    summing = warpgroup_mma(as_rows(both, query_sum), keys.index((count - 1) % S), query_sum, is_async=True)
    query_sum = warpgroup_mma_wait(0, deps=(summing,))
    gl.store(of_q + at, gl.convert_layout((query_sum * scale).to(dtype), loaded), mask=inside)


@DirectLaunch
@_any_length
def _of_keys(
    q_d, g_d, k, v, sums, along, of_k, of_v, bounds, tokens, samples, heads, scale,
    M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, G: gl.constexpr, S: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Gradients of N keys and values of a head, from all the query heads that share it, M queries at a time.

    `sums` and `along` [heads, tokens] are read up to M numbers beyond their end.
    """
    key_head = gl.program_id(1)
    begin, end, tile = _sample(bounds, samples, gl.program_id(0), 1, N)
    begin += tile * N
    steps = (end - begin + M - 1) // M
    items = steps * G
    dtype: gl.constexpr = q_d.dtype
    queries, q_bars = _places(q_d, S)
    back, g_bars = _places(g_d, S)
    fence_async_shared()
    every_warp()
    for i in gl.static_range(S):
        _fetch_both(q_d, g_d, queries, back, q_bars, g_bars, i, begin, key_head, steps, i < items, G, S)
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [num_warps, 1], [1, 0])
    at, inside = _packed(begin, end, 0, heads // G, key_head, loaded, N, 1, D)
    keys, values = _shared(k, at, inside, N, D), _shared(v, at, inside, N, D)
    fence_async_shared()
    every_warp()
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, M, 16])
    of_sum: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    zero = gl.zeros([N, M], gl.float32, of_scores)
    key = gl.arange(0, N, gl.SliceLayout(1, of_scores))[:, None]
    spread = gl.arange(0, M, gl.SliceLayout(0, of_scores))
    key_product = warpgroup_mma_init(gl.zeros([N, D], gl.float32, of_sum))
    value_product = warpgroup_mma_init(gl.zeros([N, D], gl.float32, of_sum))
    for number in range(items):
        step = number % steps
        arrived(q_bars, number, True, S)
        scores = product(keys, queries, number, zero, S)
        arrived(g_bars, number, True, S)
        change = product(values, back, number, zero, S)
        place = (key_head * G + number // steps).to(gl.int64) * tokens + begin + step * M
        logarithm, along_row = gl.load((sums + place) + spread), gl.load((along + place) + spread)
        scores, key_sum, value_sum = warpgroup_mma_wait(1, deps=(scores, key_product, value_product))
        every_warp()  # has used the tile before: its place is free
        ahead = number - 1 + S
        there = (ahead < items) & (number > 0)
        _fetch_both(q_d, g_d, queries, back, q_bars, g_bars, ahead, begin, key_head, steps, there, G, S)
        weights = gl.exp2(scores * (scale * _LOG2E) - logarithm[None, :])
        if (step * M < N) | (step == steps - 1):
            query = (step * M + spread)[None, :]
            weights = gl.where((key <= query) & (query < end - begin), weights, 0.0)
        value_product = warpgroup_mma(
            as_rows(weights.to(dtype), value_sum), back.index(number % S), value_sum, is_async=True
        )
        change = warpgroup_mma_wait(1, deps=(change,))
        both = (weights * (change - along_row[None, :])).to(dtype)
        key_product = warpgroup_mma(as_rows(both, key_sum), queries.index(number % S), key_sum, is_async=True)
    key_sum, value_sum = warpgroup_mma_wait(0, deps=(key_product, value_product))
    gl.store(of_k + at, gl.convert_layout((key_sum * scale).to(dtype), loaded), mask=inside)
    gl.store(of_v + at, gl.convert_layout(value_sum.to(dtype), loaded), mask=inside)


@gluon.jit
def _fetch_both(
    q_d, g_d, queries, back, q_bars, g_bars, number, begin, key_head, steps, there, G: gl.constexpr, S: gl.constexpr
):  # fmt: skip
    """Tile `number` of queries and of their gradients, head after head; `begin`: of the keys."""
    row = begin + (number % steps - number) * q_d.block_type.shape[0]  # `fetch` adds number times that
    column = (key_head * G + number // steps) * q_d.block_type.shape[1]
    fetch(q_d, queries, q_bars, number, row, column, there, S)
    fetch(g_d, back, g_bars, number, row, column, there, S)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return (output like q, logarithms of the softmax's denominators [heads, tokens]) of contiguous q, k, v."""
    tokens, heads, width = q.shape
    shared = heads // k.shape[1]
    out, sums = torch.empty_like(q), numbers(heads, tokens, q.device)
    keys = _rows(k, FORWARD["N"]), _rows(v, FORWARD["N"])
    grid = _tiles(lengths, shared, FORWARD["M"]), k.shape[1]
    _forward[grid](
        q, *keys, out, sums, bounds, tokens, len(lengths), heads, scale, D=width, G=shared, **FORWARD
    )
    return out, sums


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    sums: Tensor,
    along: Tensor,
    bounds: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. `sums` and `along` are `numbers`."""
    tokens, heads, width = q.shape
    shared = heads // k.shape[1]
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shape = (bounds, tokens, len(lengths), heads, scale)
    queries = _rows(q, OF_KEYS["M"]), _rows(gradient, OF_KEYS["M"])
    grid = _tiles(lengths, 1, OF_KEYS["N"]), k.shape[1]
    _of_keys[grid](*queries, k, v, sums, along, of_k, of_v, *shape, D=width, G=shared, **OF_KEYS)
    keys = _rows(k, OF_QUERIES["N"]), _rows(v, OF_QUERIES["N"])
    grid = _tiles(lengths, shared, OF_QUERIES["M"]), k.shape[1]
    _of_queries[grid](q, gradient, *keys, sums, along, of_q, *shape, D=width, G=shared, **OF_QUERIES)
    return of_q, of_k, of_v


def numbers(heads: int, tokens: int, device: torch.device) -> Tensor:
    """Return room for fp32 [heads, tokens], with zeros behind it that a kernel may read."""
    room = torch.zeros(heads * tokens + _BEYOND, dtype=torch.float32, device=device)
    return room[: heads * tokens].view(heads, tokens)


def _rows(x: Tensor, rows: int) -> Any:
    """Tiles [rows, D] of x [tokens, heads, D]."""
    return tiles(x, rows, [x.shape[2]])[0]


def _tiles(lengths: Sequence[int], rows_of_token: int, size: int) -> int:
    return sum(cdiv(length * rows_of_token, size) for length in lengths)
