"""The step plan: which samples an optimizer step sees, which rank runs which of them, in which micro-batch.

Pure functions on numpy arrays: no torch, no process group, no files. Every rank computes the same answer from
the same arguments, so nothing has to be sent, and resuming at step k is arithmetic.

The *set* of samples of a step depends on (seed, dataset fingerprint, global batch size) alone. World size and
token budget decide only how that set is dealt.
"""

import hashlib
import heapq
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from launch.errors import ConfigError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# GFLOP of Qwen2-VL-7B (hidden 3584, 28 layers; vision tower 1280 wide, 32 blocks), the language model counted
# forward and backward to activations (the base is frozen: no weight gradients), the vision tower forward only.
_LINEAR_PER_TOKEN = 2 * 13.05
_ATTENTION_PER_TOKEN_SQUARED = (
    3 * 28 * 2 * 3584 * 1e-9
)  # causal: half of 4 * T * T * hidden a layer; backward is twice it
_VISION_PER_PATCH = 1.26
_VISION_PER_PATCH_SQUARED = 4 * 1280 * 32 * 1e-9
_PATCHES_PER_VISUAL_TOKEN = 4  # the merger folds 2 x 2 patches into one token

_COST_UNITS = 2**32  # resolution of the whole numbers that costs become inside `deal`
_BALANCED = 2000  # levelling stops when the heaviest rank is within 1/2000 of the mean: no clock can tell


def cost(text_tokens: ArrayLike, visual_tokens: ArrayLike) -> Floats:
    """Relative work of training on each sample: linear layers, attention, vision tower.

    The unit is one GFLOP of the 7B model, whatever the model trained: only ratios between samples matter to
    the balance, and linear and quadratic shares change little over the model family. One image a sample.
    """
    text = np.asarray(text_tokens, dtype=np.float64)
    visual = np.asarray(visual_tokens, dtype=np.float64)
    tokens = text + visual
    patches = visual * _PATCHES_PER_VISUAL_TOKEN
    language = tokens * _LINEAR_PER_TOKEN + tokens * tokens * _ATTENTION_PER_TOKEN_SQUARED
    vision = patches * _VISION_PER_PATCH + patches * patches * _VISION_PER_PATCH_SQUARED
    return np.asarray(language + vision, dtype=np.float64)


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together.

    `samples`: positions in the split, in the order of the stream.
    `filler`: this rank had too few samples for every micro-batch of the step; it runs the step's shortest sample
    with every label masked and zero weight, so that it takes part in every collective.
    """

    samples: tuple[int, ...]
    filler: bool


def steps_of(n: int, epochs: float, global_batch_size: int) -> tuple[int, int]:
    """Whole optimizer steps in `epochs` passes over `n` samples, and the samples left over after the last one."""
    samples = int(n * epochs)
    return samples // global_batch_size, samples % global_batch_size


def step_samples(step: int, *, n: int, global_batch_size: int, seed: int, fingerprint: str) -> Ints:
    """Positions in the split of the samples of one step, in stream order; int64 [global_batch_size].

    Steps count from 0 and never end: the stream is one permutation per epoch after another. A step may lie
    across an epoch boundary, and may then hold one sample twice: once for each epoch.
    """
    if step < 0 or n < 1 or global_batch_size < 1:
        raise ValueError(f"step {step}, n {n}, global_batch_size {global_batch_size}: no such step")
    begin = step * global_batch_size
    end = begin + global_batch_size
    parts = []
    for epoch in range(begin // n, (end - 1) // n + 1):
        first = epoch * n
        parts.append(_permutation(n, seed, fingerprint, epoch)[max(begin - first, 0) : end - first])
    return np.concatenate(parts)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, fingerprint: str, epoch: int) -> Ints:
    """The order of one epoch.

    Sorting raw PCG64 output instead of calling `Generator.permutation`: numpy promises the stream of a bit
    generator for ever, and the algorithms of Generator only within a version, while a run may be resumed on
    another machine with another numpy.
    """
    key = json.dumps([seed, fingerprint, epoch]).encode()
    entropy = int.from_bytes(hashlib.sha256(key).digest(), "big")
    order = np.argsort(np.random.PCG64(entropy).random_raw(n), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def deal(
    samples: ArrayLike,
    tokens: ArrayLike,
    costs: ArrayLike,
    world_size: int,
    budget: int,
    micro_batches: int | None = None,
) -> list[list[MicroBatch]]:
    """Deal the samples of a step (or of an evaluation) to ranks and micro-batches.

    `samples`: positions in the split, in stream order. `tokens`, `costs`: of the whole split, indexed by position.
    `budget`: the most tokens of a micro-batch. `micro_batches`: how many every rank gets; None for the fewest
    that best-fit decreasing packs the samples into.

    Returns one list per rank, all of the same length. Costs are balanced over the ranks first; each rank's
    samples are then spread evenly over its micro-batches, largest first, fillers last.

    Raises ConfigError when a sample is longer than the budget or the micro-batches cannot hold the samples.
    """
    positions = np.asarray(samples, dtype=np.int64)
    lengths = np.asarray(tokens, dtype=np.int64)[positions]
    least = micro_batches_needed(lengths, world_size, budget)
    if micro_batches is None:
        micro_batches = least
    if micro_batches < least:
        raise ConfigError(
            f"micro_batches: {micro_batches} of {budget:,} tokens on each of {world_size} ranks do not hold a step of "
            f"{positions.size:,} samples ({int(lengths.sum()):,} tokens); use at least {least}"
        )
    work = _whole_costs(np.asarray(costs, dtype=np.float64)[positions])
    ranks = _deal_samples_first(lengths, work, world_size, budget, micro_batches)
    if ranks is None:
        ranks = _deal_bins_first(lengths, work, world_size, budget, micro_batches)
    filler = MicroBatch((int(positions[int(np.argmin(lengths))]),), filler=True)
    return [_name_samples(bins, positions, filler) for bins in ranks]


def micro_batches_needed(lengths: Ints, world_size: int, budget: int) -> int:
    """The fewest micro-batches per rank that best-fit decreasing packs samples of these lengths into."""
    if world_size < 1 or lengths.size < 1:
        raise ValueError(f"{lengths.size} samples cannot be dealt to {world_size} ranks")
    longest = int(lengths.max())
    if longest > budget:
        raise ConfigError(
            f"batch.micro_batch_tokens: the longest sample does not fit ({longest:,} tokens > {budget:,}); "
            f"raise it to {longest:,} or more, or lower data.max_pixels and prepare again"
        )
    return -(-len(_best_fit_decreasing(lengths.tolist(), range(lengths.size), budget)) // world_size)


Bins = list[list[int]]  # indices into the step, one list per micro-batch


def _name_samples(bins: Bins, positions: Ints, filler: MicroBatch) -> list[MicroBatch]:
    """Indices into the step become positions in the split; an empty bin becomes a filler."""
    return [MicroBatch(tuple(positions[sorted(b)].tolist()), filler=False) if b else filler for b in bins]


def _whole_costs(costs: Floats) -> Ints:
    """Costs as whole numbers >= 1: sums are then exact, so that no processor's order of additions can deal otherwise."""
    top = float(costs.max())
    if top <= 0:
        return np.ones(costs.size, dtype=np.int64)
    return np.maximum(np.rint(costs * (_COST_UNITS / top)).astype(np.int64), 1)


def _deal_samples_first(
    lengths: Ints, work: Ints, world_size: int, budget: int, micro_batches: int
) -> list[Bins] | None:
    """Balance samples over ranks, then pack each rank; None when some rank's samples do not fit."""
    rank_of = _spread(work, world_size)
    _level(work, lengths, rank_of, np.arange(world_size), budget=int(lengths.sum()))
    ranks = []
    for members in _members(rank_of, world_size):
        bins = _pack(lengths, members, budget, micro_batches)
        if bins is None:
            return None
        ranks.append(bins)
    return ranks


def _deal_bins_first(
    lengths: Ints, work: Ints, world_size: int, budget: int, micro_batches: int
) -> list[Bins]:
    """Pack the whole step, then deal the bins to ranks, then level by swaps that keep every bin within the budget."""
    count = world_size * micro_batches
    bins = _pack(lengths, range(lengths.size), budget, count)
    if bins is None:
        raise AssertionError("best-fit decreasing fitted before")
    bin_work = np.array([int(work[b].sum()) for b in bins], dtype=np.int64)
    rank_of_bin = _spread(bin_work, world_size, most=micro_batches)
    bin_of = np.empty(lengths.size, dtype=np.int64)
    for index, members in enumerate(bins):
        bin_of[members] = index
    _level(work, lengths, bin_of, rank_of_bin, budget)
    ranks: list[Bins] = [[] for _ in range(world_size)]
    for index, members in enumerate(_members(bin_of, count)):
        ranks[rank_of_bin[index]].append(members)
    return [_largest_first(rank, lengths) for rank in ranks]


def _members(group_of: Ints, groups: int) -> Bins:
    """The indices of each group, ascending."""
    members: Bins = [[] for _ in range(groups)]
    for index, group in enumerate(group_of.tolist()):
        members[group].append(index)
    return members


def _spread(weights: Ints, groups: int, most: int | None = None) -> Ints:
    """Longest processing time first: each weight, heaviest first, to the lightest group; at most `most` in one."""
    group_of = np.empty(weights.size, dtype=np.int64)
    heap = [(0, 0, group) for group in range(groups)]
    values = weights.tolist()
    for index in np.argsort(-weights, kind="stable").tolist():
        load, held, group = heap[0]
        group_of[index] = group
        if most is not None and held + 1 == most:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (load + values[index], held + 1, group))
    return group_of


def _level(work: Ints, lengths: Ints, bin_of: Ints, rank_of_bin: Ints, budget: int) -> None:
    """Lower the heaviest rank, by the best swap or move of one sample at a time, until nothing lowers it.

    Changes `bin_of` in place. No bin grows beyond `budget` tokens.
    """
    bins = rank_of_bin.size
    # One more sample of no work and no length in each bin: swapping with it is a move.
    work = np.concatenate([work, np.zeros(bins, dtype=np.int64)])
    lengths = np.concatenate([lengths, np.zeros(bins, dtype=np.int64)])
    where = np.concatenate([bin_of, np.arange(bins)])
    rank_of = rank_of_bin[where]
    loads = np.bincount(rank_of, weights=work).astype(np.int64)
    room = budget - np.bincount(where, weights=lengths).astype(np.int64)
    mean = int(loads.sum()) // loads.size
    for _ in range(4 * bin_of.size):
        heaviest = int(np.argmax(loads))
        top = int(loads[heaviest])
        if (top - mean) * _BALANCED <= mean:
            break
        swap = _best_swap(work, lengths, where, rank_of, loads, room, heaviest)
        if swap is None:
            break
        give, take = swap
        delta, shift = int(work[give] - work[take]), int(lengths[give] - lengths[take])
        loads[heaviest] -= delta
        loads[rank_of[take]] += delta
        room[where[give]] += shift
        room[where[take]] -= shift
        if take < bin_of.size:
            where[give], where[take] = where[take], where[give]
            rank_of[give], rank_of[take] = rank_of[take], rank_of[give]
        else:
            where[give], rank_of[give] = where[take], rank_of[take]
    bin_of[:] = where[: bin_of.size]


def _best_swap(
    work: Ints, lengths: Ints, where: Ints, rank_of: Ints, loads: Ints, room: Ints, heaviest: int
) -> tuple[int, int] | None:
    """The (own, other) sample whose swap leaves the lower maximum of the two ranks; None when none lowers it."""
    own = np.flatnonzero((rank_of == heaviest) & (work > 0))
    other = np.flatnonzero(rank_of != heaviest)
    delta = work[own][:, None] - work[other][None, :]
    after = np.maximum(loads[heaviest] - delta, loads[rank_of[other]][None, :] + delta)
    shift = lengths[own][:, None] - lengths[other][None, :]
    fits = (shift <= room[where[other]][None, :]) & (-shift <= room[where[own]][:, None])
    after = np.where(fits, after, np.iinfo(np.int64).max)
    best = int(np.argmin(after))
    if after.flat[best] >= loads[heaviest]:
        return None
    return int(own[best // other.size]), int(other[best % other.size])


def _pack(lengths: Ints, members: Sequence[int], budget: int, count: int) -> Bins | None:
    """Pack `members` into `count` bins of at most `budget` tokens, as even as they come; None when they do not fit."""
    indices = np.asarray(members, dtype=np.int64)
    bin_of = _spread(lengths[indices], count)
    bins = [[int(indices[i]) for i in group] for group in _members(bin_of, count)]
    if max(int(lengths[b].sum()) for b in bins) > budget:
        bins = _best_fit_decreasing(lengths.tolist(), members, budget)
        if len(bins) > count:
            return None
        bins += [[] for _ in range(count - len(bins))]
    return _largest_first(bins, lengths)


def _largest_first(bins: Bins, lengths: Ints) -> Bins:
    """By tokens, descending: the ranks then run their large micro-batches together, and memory peaks at once."""
    return sorted(bins, key=lambda b: -int(lengths[b].sum()))


def _best_fit_decreasing(lengths: Sequence[int], members: Sequence[int], budget: int) -> Bins:
    """Each sample, longest first, into the fullest bin that still has room for it; a new bin when none has."""
    bins: Bins = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for index in sorted(members, key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            bins.append([index])
            insort(rooms, (budget - length, len(bins) - 1))
        else:
            room, into = rooms.pop(at)
            bins[into].append(index)
            insort(rooms, (room - length, into))
    return bins


@dataclass(frozen=True, eq=False)
class StepPlan:
    """All steps of a run: each is computed when asked for, none is stored.

    `micro_batches` is the number M of micro-batches of every rank in every step; `tokens` and `costs` are of the
    whole split, by position.
    """

    n: int
    global_batch_size: int
    world_size: int
    max_steps: int
    micro_batches: int
    budget: int
    seed: int
    fingerprint: str
    tokens: Ints = field(repr=False)
    costs: Floats = field(repr=False)

    def samples(self, step: int) -> Ints:
        """Positions in the split of the samples of `step`, in stream order."""
        return step_samples(
            step,
            n=self.n,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            fingerprint=self.fingerprint,
        )

    def ranks(self, step: int) -> list[list[MicroBatch]]:
        """The micro-batches of every rank."""
        return deal(
            self.samples(step), self.tokens, self.costs, self.world_size, self.budget, self.micro_batches
        )

    def micro_batches_of(self, step: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of one rank, as many in every step."""
        return self.ranks(step)[rank]


def plan_steps(
    tokens: ArrayLike,
    costs: ArrayLike,
    *,
    global_batch_size: int,
    world_size: int,
    budget: int,
    max_steps: int,
    seed: int,
    fingerprint: str,
) -> StepPlan:
    """Find the number of micro-batches that fits every one of the `max_steps` steps.

    `tokens`, `costs`: of every sample of the split. `budget`: the most tokens of a micro-batch.
    Raises ConfigError with every reason why the run cannot be dealt.
    """
    lengths = np.asarray(tokens, dtype=np.int64)
    problems = []
    if world_size > global_batch_size:
        problems.append(
            f"batch.global_batch_size: a step has fewer samples than there are processes "
            f"({global_batch_size} < {world_size}); start at most {global_batch_size} processes, or raise it"
        )
    if lengths.size == 0:
        problems.append("data.train: the split is empty (0 rows); choose another split")
    elif int(lengths.max()) > budget:
        problems.append(
            f"batch.micro_batch_tokens: the longest sample does not fit ({int(lengths.max()):,} tokens > {budget:,}); "
            f"raise it to {int(lengths.max()):,} or more, or lower data.max_pixels and prepare again"
        )
    if max_steps < 1:
        problems.append(
            f"training.max_steps: there is no whole step to train ({max_steps}); "
            f"lower batch.global_batch_size or raise training.num_train_epochs"
        )
    if problems:
        raise ConfigError(problems)
    micro_batches = 1
    for step in range(max_steps):
        of_step = step_samples(
            step, n=lengths.size, global_batch_size=global_batch_size, seed=seed, fingerprint=fingerprint
        )
        micro_batches = max(micro_batches, micro_batches_needed(lengths[of_step], world_size, budget))
    return StepPlan(
        n=lengths.size,
        global_batch_size=global_batch_size,
        world_size=world_size,
        max_steps=max_steps,
        micro_batches=micro_batches,
        budget=budget,
        seed=seed,
        fingerprint=fingerprint,
        tokens=lengths,
        costs=np.asarray(costs, dtype=np.float64),
    )
