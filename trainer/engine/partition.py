"""Where the parts of a partitioned parameter lie: arithmetic alone, without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """`count` elements of a flattened parameter from `begin` on, which lie in a process's shard from `at` on."""

    begin: int
    at: int
    count: int


def piece_of_flat(offset: int, numel: int, shard_begin: int, shard_size: int) -> Piece:
    """ZeRO-1 and 2: parameters lie end to end in one row, which is cut into equal shards.

    `offset`, `numel`: of the parameter in the row; `shard_begin`, `shard_size`: of the process's shard in the row.
    `count` is 0 where the two do not meet.
    """
    first = max(offset, shard_begin)
    last = min(offset + numel, shard_begin + shard_size)
    if last <= first:
        return Piece(0, 0, 0)
    return Piece(first - offset, first - shard_begin, last - first)


def piece_of_own(numel: int, rank: int, share: int, at: int) -> Piece:
    """ZeRO-3: every parameter is cut by itself into shares of equal size, the last ones padded or empty.

    `share`: elements of a share, padding included; `at`: where this process's share begins in its shard.
    """
    begin = min(rank * share, numel)
    return Piece(begin, at, max(0, min(share, numel - begin)))
