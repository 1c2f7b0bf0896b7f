"""Where ZeRO's shards hold a parameter: all of it, once, for every world size and every odd number of elements."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.engine.partition import piece_of_flat, piece_of_own

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=8)
WORLDS = st.integers(1, 5)


@given(SIZES, WORLDS, st.integers(0, 7))
def test_the_shards_of_a_row_hold_every_parameter_once(sizes: list[int], world: int, padding: int) -> None:
    """ZeRO-1 and 2: parameters end to end, the row padded and cut into equal shards."""
    share = math.ceil((sum(sizes) + padding) / world)
    row = [(number, place) for number, size in enumerate(sizes) for place in range(size)]
    shards = [row[rank * share : (rank + 1) * share] for rank in range(world)]
    offset = 0
    for number, size in enumerate(sizes):
        found: list[tuple[int, int]] = []
        for rank in range(world):
            piece = piece_of_flat(offset, size, rank * share, share)
            held = shards[rank][piece.at : piece.at + piece.count]
            assert held == [(number, place) for place in range(piece.begin, piece.begin + piece.count)]
            found += held
        assert found == [(number, place) for place in range(size)]
        offset += size


@given(SIZES, WORLDS)
def test_the_shares_of_each_parameter_hold_it_once(sizes: list[int], world: int) -> None:
    """ZeRO-3: each cut by itself, the last shares padded or empty, one after another in a process's shard."""
    for rank in range(world):
        at = 0
        for size in sizes:
            share = math.ceil(size / world)
            piece = piece_of_own(size, rank, share, at)
            assert at <= piece.at <= piece.at + piece.count <= at + share
            assert (piece.begin, piece.count) == (
                min(rank * share, size),
                max(0, min(share, size - rank * share)),
            )
            at += share
    for size in sizes:
        share = math.ceil(size / world)
        pieces = [piece_of_own(size, rank, share, 0) for rank in range(world)]
        held = [place for piece in pieces for place in range(piece.begin, piece.begin + piece.count)]
        assert held == list(range(size))
