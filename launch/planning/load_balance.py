"""Assigning the samples of one step: to ranks so that their work is balanced, to micro-batches within a budget.

Pure functions of their arguments, in whole numbers: every rank computes the same assignment on any machine.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from launch.errors import ConfigError
from launch.planning.bin_packing import (
    Groups,
    balance,
    best_fit_decreasing,
    fill_empty,
    largest_first,
    members_of,
    pack_into,
    total,
)

_COST_UNITS = 2**32  # resolution of the whole numbers that costs become inside `assign`
_BALANCED = 500  # levelling stops when the heaviest rank is within 1/500 of the mean: no step is timed finer
_MOST_TRIES = 6_000  # samples offered in levelling: about 10 ms; few ranks or many samples need far less


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together.

    `samples`: positions in the split, in the order of the stream.
    `filler`: this rank has fewer samples than micro-batches; it runs the step's shortest sample with every
    label masked and zero weight, so that it takes part in every collective.
    """

    samples: tuple[int, ...]
    filler: bool


def assign(
    samples: ArrayLike,
    tokens: ArrayLike,
    costs: ArrayLike,
    world_size: int,
    budget: int,
    micro_batches: int | None = None,
) -> list[list[MicroBatch]]:
    """Assign the samples of a step (or of an evaluation) to ranks and micro-batches.

    `samples`: positions in the split, in stream order. `tokens`, `costs`: of the whole split, by position.
    `budget`: the most tokens of a micro-batch. `micro_batches`: how many every rank gets; None for the fewest
    that best-fit decreasing packs the samples into.

    Returns one list per rank, all of the same length. Costs are balanced over the ranks first; each rank's
    samples are then spread evenly over its micro-batches, largest first, fillers last.

    Raises ConfigError when a sample is longer than the budget or the micro-batches cannot hold the samples.
    """
    positions = np.asarray(samples, dtype=np.int64)
    lengths: list[int] = np.asarray(tokens, dtype=np.int64)[positions].tolist()
    least = micro_batches_needed(lengths, world_size, budget)
    if micro_batches is None:
        micro_batches = least
    if micro_batches < least:
        raise ConfigError(
            f"micro_batches: {micro_batches} of {budget:,} tokens on each of {world_size} ranks do not hold "
            f"{positions.size:,} samples ({sum(lengths):,} tokens); use {least} or more"
        )
    work = _whole_costs(np.asarray(costs, dtype=np.float64)[positions])
    ranks = _assign_samples_first(lengths, work, world_size, budget, micro_batches)
    if ranks is None:
        ranks = _assign_bins_first(lengths, work, world_size, budget, micro_batches)
    names: list[int] = positions.tolist()
    filler = MicroBatch((names[lengths.index(min(lengths))],), filler=True)
    return [[_micro_batch(group, names, filler) for group in groups] for groups in ranks]


def micro_batches_needed(lengths: Sequence[int], world_size: int, budget: int) -> int:
    """Count the fewest micro-batches per rank that best-fit decreasing packs samples of these lengths into.

    Never more than samples / ranks, rounded up. Raises ConfigError when a sample is longer than the budget.
    """
    if world_size < 1 or not lengths:
        raise ValueError(f"{len(lengths)} samples cannot be dealt to {world_size} ranks")
    if max(lengths) > budget:
        raise ConfigError(too_long(max(lengths), budget))
    return -(-len(best_fit_decreasing(lengths, range(len(lengths)), budget)) // world_size)


def most_micro_batches(
    lengths_of: Callable[[int], NDArray[np.int64]], steps: int, world_size: int, budget: int
) -> int:
    """Find the largest `micro_batches_needed` of the steps 0 to `steps`, whose sample lengths are `lengths_of(step)`.

    Packing every step of a large run takes seconds. But a pack is opened for a sample that fits into none of those
    before, so each of them lacks less than the step's longest sample: that bounds the packs of most steps well enough.
    """
    sizes = [(lengths.sum(), lengths.max()) for lengths in map(lengths_of, range(steps))]
    totals, longest = np.array(sizes).T
    packs_at_most = (totals - 1) // (budget - longest + 1) + 1
    most = 1
    for step in np.argsort(-totals, kind="stable").tolist():
        if packs_at_most[step] > most * world_size:
            most = max(most, micro_batches_needed(lengths_of(step).tolist(), world_size, budget))
    return most


def too_long(longest: int, budget: int) -> str:
    """Word the refusal of a budget below the longest sample."""
    return (
        f"batch.micro_batch_tokens: the longest sample does not fit ({longest:,} tokens > {budget:,}); "
        f"raise it to {longest:,} or more, or lower data.max_pixels and prepare again"
    )


def _micro_batch(group: list[int], names: list[int], filler: MicroBatch) -> MicroBatch:
    """Places in the step become positions in the split; an empty group becomes a filler."""
    return MicroBatch(tuple(names[i] for i in sorted(group)), filler=False) if group else filler


def _whole_costs(costs: NDArray[np.float64]) -> list[int]:
    """Costs as whole numbers >= 1.

    Their sums are exact, so that no processor's order of additions can lead one rank to another assignment.
    """
    top = float(costs.max())
    scaled = costs / top * _COST_UNITS if top > 0 else costs
    whole: list[int] = np.maximum(np.rint(scaled), 1).astype(np.int64).tolist()
    return whole


def _assign_samples_first(
    lengths: list[int], work: list[int], world_size: int, budget: int, micro_batches: int
) -> list[Groups] | None:
    """Balance samples over ranks, then pack each rank; None when the samples of some rank do not fit."""
    greedy = balance(work, world_size)
    rank_of = _level(work, lengths, greedy, list(range(world_size)), budget=sum(lengths))
    ranks = []
    for members in members_of(rank_of, world_size):
        groups = pack_into(lengths, members, budget, micro_batches)
        if groups is None:
            return None
        ranks.append(groups)
    return ranks


def _assign_bins_first(
    lengths: list[int], work: list[int], world_size: int, budget: int, micro_batches: int
) -> list[Groups]:
    """Pack the whole step, assign the bins to ranks, then level by swaps that keep bins within the budget."""
    bins = world_size * micro_batches
    packed = pack_into(lengths, range(len(lengths)), budget, bins)
    if packed is None:
        raise AssertionError(f"best-fit decreasing packed {len(lengths)} samples into at most {bins} before")
    bin_of = [0] * len(lengths)
    for index, members in enumerate(packed):
        for member in members:
            bin_of[member] = index
    rank_of_bin = balance([total(members, work) for members in packed], world_size, most=micro_batches)
    levelled = members_of(_level(work, lengths, bin_of, rank_of_bin, budget), bins)
    ranks: list[Groups] = [[] for _ in range(world_size)]
    for rank, members in zip(rank_of_bin, levelled, strict=True):
        ranks[rank].append(members)
    return [largest_first(fill_empty(groups, lengths), lengths) for groups in ranks]


def _level(
    work: list[int], lengths: list[int], bin_of: list[int], rank_of_bin: list[int], budget: int
) -> list[int]:
    """Lower the heaviest rank, a swap or move at a time, until nothing lowers it; returns the new `bin_of`.

    No bin grows beyond `budget` tokens.
    """
    levelling = RankBalancer(work, lengths, bin_of, rank_of_bin, budget)
    while not levelling.is_level() and levelling.lower_heaviest():
        pass
    return levelling.bin_of[: len(bin_of)]


class RankBalancer:
    """Which sample is in which bin while samples are swapped, and what each rank and bin then holds."""

    def __init__(
        self, work: list[int], lengths: list[int], bin_of: list[int], rank_of_bin: list[int], budget: int
    ) -> None:
        bins, ranks = len(rank_of_bin), max(rank_of_bin) + 1
        # One sample more in each bin, of no work and no length: swapping with it is a move.
        self.samples = len(bin_of)
        self.work, self.lengths = work + [0] * bins, lengths + [0] * bins
        self.bin_of = bin_of + list(range(bins))
        self.loads, self.room = [0] * ranks, [budget] * bins
        self.held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]  # (work, sample), ascending
        for sample, into in enumerate(self.bin_of):
            self.loads[rank_of_bin[into]] += self.work[sample]
            self.room[into] -= self.lengths[sample]
            insort(self.held[rank_of_bin[into]], (self.work[sample], sample))
        self.by_load = sorted((load, rank) for rank, load in enumerate(self.loads))
        self.even = sum(self.loads) // ranks
        self.tries = 0

    def is_level(self) -> bool:
        """Say whether the heaviest rank is as close to the mean as it has to be."""
        return (self.by_load[-1][0] - self.even) * _BALANCED <= self.even

    def lower_heaviest(self) -> bool:
        """Swap between the heaviest rank and the lightest with a useful swap; False when none has one."""
        top, heaviest = self.by_load[-1]
        for load, lighter in self.by_load[:-1]:
            self.tries += len(self.held[heaviest])
            if self.tries > _MOST_TRIES:
                return False
            swap = _best_swap(self.held[heaviest], self.held[lighter], top - load, self._fits)
            if swap is not None:
                self._swap(heaviest, lighter, *swap)
                return True
        return False

    def _fits(self, give: int, take: int) -> bool:
        grown = self.lengths[give] - self.lengths[take]
        return grown <= self.room[self.bin_of[take]] and -grown <= self.room[self.bin_of[give]]

    def _swap(self, heaviest: int, lighter: int, give: int, take: int) -> None:
        moved_work, grown = self.work[give] - self.work[take], self.lengths[give] - self.lengths[take]
        for rank, change in ((heaviest, -moved_work), (lighter, moved_work)):
            del self.by_load[bisect_left(self.by_load, (self.loads[rank], rank))]
            self.loads[rank] += change
            insort(self.by_load, (self.loads[rank], rank))
        here, there = self.bin_of[give], self.bin_of[take]
        self.room[here] += grown
        self.room[there] -= grown
        self.bin_of[give] = there
        _pass(self.held[heaviest], self.held[lighter], (self.work[give], give))
        if take < self.samples:  # the empty sample of a bin stays there
            self.bin_of[take] = here
            _pass(self.held[lighter], self.held[heaviest], (self.work[take], take))


def _pass(giver: list[tuple[int, int]], taker: list[tuple[int, int]], item: tuple[int, int]) -> None:
    """Move `item` from one ascending list to another."""
    del giver[bisect_left(giver, item)]
    insort(taker, item)


def _best_swap(
    own: list[tuple[int, int]], other: list[tuple[int, int]], gap: int, fits: Callable[[int, int], bool]
) -> tuple[int, int] | None:
    """Find the samples (given, taken) whose swap leaves the lower maximum of two ranks; None when none lowers it.

    `own`, `other`: (work, sample), ascending, of the heavier and the lighter rank, `gap` apart.
    Giving away g leaves the larger of the two `max(gap - g, g)` above the lighter rank's old load.
    """
    best, swap, end = gap, None, len(other)
    for mine, give in own:
        if not mine:
            continue
        middle = bisect_left(other, (mine - gap // 2, 0))
        for run in (range(middle, end), range(middle - 1, -1, -1)):  # from g = gap / 2 outwards
            for at in run:
                theirs, take = other[at]
                moved_work = mine - theirs
                top = moved_work if 2 * moved_work > gap else gap - moved_work
                if top >= best:
                    break
                if fits(give, take):
                    best, swap = top, (give, take)
                    break
    return swap
