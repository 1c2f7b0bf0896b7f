"""Triton kernels for the language model's attention: causal, samples of any size in one call, grouped key heads.

FlashAttention 2, which is PyTorch's, was made for an older card: on the way back it adds to fp32 copies of the queries'
gradients by atomics, and writes those of keys and values once for each query head. Here a program owns what it writes:
a tile of queries, or a tile of keys and values for all the query heads that share it. So nothing is added up twice and
the sums have one order: forward and backward repeat to the bit on one GPU, `training.deterministic` or not. The
algorithm is FlashAttention's (Dao, arXiv 2307.08691).

Tensors are [tokens, heads, channels], row-major, the samples end to end. Scores, softmax and sums are fp32; weights and
their gradients are rounded to the inputs' dtype before they are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trainer.model.kernel_launch import DirectLaunch

_LOG2E = tl.constexpr(1.4426950408889634)  # the kernels' powers are of 2
FORWARD = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3}
OF_KEYS = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 2}
OF_QUERIES = {"M": 64, "N": 32, "num_warps": 4, "num_stages": 3}

_any_length = triton.jit(do_not_specialize=["samples", "tokens"])


@triton.jit
def _place(bounds, samples, tile, SIZE: tl.constexpr):
    """(begin, end) of the sample that a tile lies in, and its first row: tiles are numbered sample after sample."""
    sample, first, ended = 0, 0, 0
    for number in range(samples):
        ended += (tl.load(bounds + number + 1) - tl.load(bounds + number) + SIZE - 1) // SIZE
        sample = tl.where(tile >= ended, number + 1, sample)
        first = tl.where(tile >= ended, ended, first)
    begin, end = tl.load(bounds + sample), tl.load(bounds + sample + 1)
    return begin, end, begin + (tile - first) * SIZE


@triton.jit
def _rows(x, row, head, heads, end, D: tl.constexpr):
    """[rows, D] of one head of x [tokens, heads, D], zeros from `end` on."""
    at = (row[:, None].to(tl.int64) * heads + head) * D + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=(row < end)[:, None], other=0.0)


@triton.jit
def _store_rows(x, value, row, head, heads, end, D: tl.constexpr):
    at = (row[:, None].to(tl.int64) * heads + head) * D + tl.arange(0, D)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=(row < end)[:, None])


@triton.jit
def _soften(scores, largest, total, kept_sum, values):
    """One step of the running softmax: scores [M, N] in powers of 2, values [N, D]."""
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    kept = tl.exp2(largest - higher)
    total = total * kept + tl.sum(weights, axis=1)
    kept_sum = tl.dot(weights.to(values.dtype), values, kept_sum * kept[:, None])
    return higher, total, kept_sum


@DirectLaunch
@_any_length
def forward(
    q,
    k,
    v,
    out,
    sums,
    bounds,
    tokens,
    samples,
    heads,
    shared,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """out like q [tokens, heads, D] and sums fp32 [heads, tokens]: the logarithms (of 2) of the softmax's denominators.

    `shared`: query heads to a head of k and v [tokens, heads / shared, D].
    """
    head = tl.program_id(1)
    begin, end, first = _place(bounds, samples, tl.program_id(0), M)
    row = first + tl.arange(0, M)
    queries = _rows(q, row, head, heads, end, D)
    of_keys, key_heads = head // shared, heads // shared
    largest = tl.full((M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((M,), dtype=tl.float32)
    kept_sum = tl.zeros((M, D), dtype=tl.float32)
    scale *= _LOG2E
    whole = begin + (first - begin) // N * N  # keys up to here are seen by every query of the tile
    column = tl.arange(0, N)
    channel = tl.arange(0, D)
    for key in range(begin, whole, N):
        at = ((key + column)[:, None].to(tl.int64) * key_heads + of_keys) * D + channel[None, :]
        scores = tl.dot(queries, tl.trans(tl.load(k + at))) * scale
        largest, total, kept_sum = _soften(scores, largest, total, kept_sum, tl.load(v + at))
    for key in range(whole, tl.minimum(first + M, end), N):
        scores = tl.dot(queries, tl.trans(_rows(k, key + column, of_keys, key_heads, end, D))) * scale
        scores = tl.where((key + column)[None, :] <= row[:, None], scores, float("-inf"))
        values = _rows(v, key + column, of_keys, key_heads, end, D)
        largest, total, kept_sum = _soften(scores, largest, total, kept_sum, values)
    _store_rows(out, kept_sum / total[:, None], row, head, heads, end, D)
    tl.store(sums + head.to(tl.int64) * tokens + row, largest + tl.log2(total), mask=row < end)


@DirectLaunch
@_any_length
def along(out, gradient, along, tokens, heads, H: tl.constexpr, D: tl.constexpr):
    """along fp32 [heads, tokens]: the sum over channels of out * gradient [tokens, heads, D]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, H)
    at = (token * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    inside = (head < heads)[:, None]
    one = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(along + head.to(tl.int64) * tokens + token, tl.sum(one * other, axis=1), mask=head < heads)


@DirectLaunch
@_any_length
def of_keys(
    q,
    k,
    v,
    gradient,
    sums,
    along,
    of_k,
    of_v,
    bounds,
    tokens,
    samples,
    heads,
    shared,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of N keys and values of one of their heads, from all the query heads that share it."""
    of_keys, key_heads = tl.program_id(1), heads // shared
    _, end, first = _place(bounds, samples, tl.program_id(0), N)
    row = first + tl.arange(0, N)
    keys, values = _rows(k, row, of_keys, key_heads, end, D), _rows(v, row, of_keys, key_heads, end, D)
    key_sum = tl.zeros((N, D), dtype=tl.float32)
    value_sum = tl.zeros((N, D), dtype=tl.float32)
    for number in range(shared):
        head = of_keys * shared + number
        of_head = head.to(tl.int64) * tokens
        for query in range(first, end, M):
            at = query + tl.arange(0, M)
            queries = _rows(q, at, head, heads, end, D)
            logarithm = tl.load(sums + of_head + at, mask=at < end, other=float("inf"))
            scores = tl.dot(keys, tl.trans(queries)) * (scale * _LOG2E)
            weights = tl.exp2(scores - logarithm[None, :])
            if query < first + N:
                weights = tl.where(row[:, None] <= at[None, :], weights, 0.0)
            back = _rows(gradient, at, head, heads, end, D)
            value_sum = tl.dot(weights.to(back.dtype), back, value_sum)
            change = tl.dot(values, tl.trans(back))
            change -= tl.load(along + of_head + at, mask=at < end, other=0.0)[None, :]
            key_sum = tl.dot((weights * change).to(queries.dtype), queries, key_sum)
    _store_rows(of_k, key_sum * scale, row, of_keys, key_heads, end, D)
    _store_rows(of_v, value_sum, row, of_keys, key_heads, end, D)


@triton.jit
def _query_step(queries, back, logarithm, along, keys, values, query_sum, scale, seen, MASKED: tl.constexpr):
    scores = tl.dot(queries, tl.trans(keys)) * scale
    weights = tl.exp2(scores - logarithm[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    change = tl.dot(back, tl.trans(values)) - along[:, None]
    return tl.dot((weights * change).to(keys.dtype), keys, query_sum)


@DirectLaunch
@_any_length
def of_queries(
    q,
    k,
    v,
    gradient,
    sums,
    along,
    of_q,
    bounds,
    tokens,
    samples,
    heads,
    shared,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of M queries of one head."""
    head = tl.program_id(1)
    begin, end, first = _place(bounds, samples, tl.program_id(0), M)
    row = first + tl.arange(0, M)
    queries, back = _rows(q, row, head, heads, end, D), _rows(gradient, row, head, heads, end, D)
    of_head = head.to(tl.int64) * tokens
    logarithm = tl.load(sums + of_head + row, mask=row < end, other=float("inf"))
    along_row = tl.load(along + of_head + row, mask=row < end, other=0.0)
    of_keys, key_heads = head // shared, heads // shared
    query_sum = tl.zeros((M, D), dtype=tl.float32)
    column, channel = tl.arange(0, N), tl.arange(0, D)
    whole = begin + (first - begin) // N * N
    for key in range(begin, whole, N):
        at = ((key + column)[:, None].to(tl.int64) * key_heads + of_keys) * D + channel[None, :]
        keys, values = tl.load(k + at), tl.load(v + at)
        query_sum = _query_step(
            queries, back, logarithm, along_row, keys, values, query_sum, scale * _LOG2E, 0, False
        )
    for key in range(whole, tl.minimum(first + M, end), N):
        keys = _rows(k, key + column, of_keys, key_heads, end, D)
        values = _rows(v, key + column, of_keys, key_heads, end, D)
        seen = (key + column)[None, :] <= row[:, None]
        query_sum = _query_step(
            queries, back, logarithm, along_row, keys, values, query_sum, scale * _LOG2E, seen, True
        )
    _store_rows(of_q, query_sum * scale, row, head, heads, end, D)
