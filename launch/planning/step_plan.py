"""The step plan: which samples an optimizer step sees, which rank runs which of them, in which micro-batch.

Pure functions on numpy arrays: no torch, no process group, no files. Every rank computes the same answer from
the same arguments, so nothing has to be sent, and resuming at step k is arithmetic.

The *set* of samples of a step depends on (seed, dataset fingerprint, global batch size) alone. World size and
token budget decide only how that set is assigned to ranks (launch/planning/load_balance.py).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict

from launch.errors import ConfigError
from launch.planning.load_balance import MicroBatch, assign, most_micro_batches, too_long

__all__ = [
    "MicroBatch",
    "SampleStream",
    "StepPlan",
    "StreamOffset",
    "assign",
    "cost",
    "plan_steps",
    "steps_of",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# GFLOP of Qwen2-VL-7B (hidden 3584, 28 layers; vision tower 1280 wide, 32 blocks): the language model forward
# and backward to activations (the base is frozen: no weight gradients), the vision tower forward only.
_LINEAR_PER_TOKEN = 2 * 13.05
# Causal: half of 4 * T * T * hidden a layer; backward is twice it.
_ATTENTION_PER_TOKEN_SQUARED = 3 * 28 * 2 * 3584 * 1e-9
_VISION_PER_PATCH = 1.26
_VISION_PER_PATCH_SQUARED = 4 * 1280 * 32 * 1e-9
_PATCHES_PER_VISUAL_TOKEN = 4  # the merger folds 2 x 2 patches into one token


def cost(
    text_tokens: ArrayLike,
    visual_tokens: ArrayLike,
    visual_squares: ArrayLike | None = None,
    prefix_tokens: ArrayLike | None = None,
) -> Floats:
    """Relative work of training on each sample: linear layers, attention, vision tower.

    The unit is one GFLOP of the 7B model, whatever the model trained: only ratios between samples matter to
    the balance, and linear and quadratic shares change little over the model family. `visual_squares`: the sum of the
    squares of the images' visual tokens, because images do not attend to each other; None: one image a sample.
    `prefix_tokens`: those of its text that the linear layers compute once for all samples; None: none.
    """
    text = np.asarray(text_tokens, dtype=np.float64)
    visual = np.asarray(visual_tokens, dtype=np.float64)
    tokens = text + visual
    patches = visual * _PATCHES_PER_VISUAL_TOKEN
    squares = visual * visual if visual_squares is None else np.asarray(visual_squares, dtype=np.float64)
    patches_squared = squares * _PATCHES_PER_VISUAL_TOKEN**2
    own = tokens if prefix_tokens is None else tokens - np.asarray(prefix_tokens, dtype=np.float64)
    language = own * _LINEAR_PER_TOKEN + tokens * tokens * _ATTENTION_PER_TOKEN_SQUARED
    vision = patches * _VISION_PER_PATCH + patches_squared * _VISION_PER_PATCH_SQUARED
    return np.asarray(language + vision, dtype=np.float64)


def steps_of(n: int, epochs: float, global_batch_size: int, first_sample: int = 0) -> tuple[int, int]:
    """Count the whole optimizer steps in `epochs` passes over `n` samples, and the samples left over after the last.

    `first_sample`: samples of these passes that were seen before the first of the steps.
    """
    samples = int(n * Fraction(str(epochs)))  # as written: 100 samples x 0.29 are 29, not 28.999...
    return divmod(max(0, samples - first_sample), global_batch_size)


@dataclass(frozen=True)
class StreamOffset:
    """Where the arithmetic of a stream begins: step `step` sees it from position `sample` on.

    0, 0 but for a run that went on with another global batch size.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # plan.json holds one
    step: int = 0
    sample: int = 0


@dataclass(frozen=True)
class SampleStream:
    """The endless stream of samples that the steps of a run see: a permutation of the split for every epoch."""

    n: int
    """Samples in the training split, so of one epoch."""
    global_batch_size: int
    """Samples of one optimizer step, over all ranks."""
    seed: int
    """`training.seed` of the recipe."""
    fingerprint: str
    """Of the dataset: other rows come in another order."""
    begin: StreamOffset = field(default_factory=StreamOffset)
    """The first step, and the position in the stream where it begins."""

    def samples(self, step: int) -> Ints:
        """Return the positions in the split of the samples of one step, in stream order; int64 [global_batch_size].

        Steps count from 0 and never end. A step may lie across an epoch boundary, and may then hold one sample twice:
        once for each epoch. ValueError for a step before the first, or a stream without samples.
        """
        n, size = self.n, self.global_batch_size
        if step < self.begin.step or n < 1 or size < 1:
            raise ValueError(f"step {step}, n {n}, global_batch_size {size}: no such step")
        begin = self.consumed(step)
        end = begin + size
        parts = []
        for epoch in range(begin // n, (end - 1) // n + 1):
            first = epoch * n
            order = _permutation(n, self.seed, self.fingerprint, epoch)
            parts.append(order[max(begin - first, 0) : end - first])
        return np.concatenate(parts)

    def consumed(self, step: int) -> int:
        """Samples that the first `step` optimizer steps have seen."""
        return self.begin.sample + (step - self.begin.step) * self.global_batch_size


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, fingerprint: str, epoch: int) -> Ints:
    """Draw the order of one epoch.

    Sorting raw PCG64 output instead of calling `Generator.permutation`: numpy promises the stream of a bit
    generator for ever, and the algorithms of Generator only within a version, while a run may be resumed on
    another machine with another numpy.
    """
    key = json.dumps([seed, fingerprint, epoch]).encode()
    entropy = int.from_bytes(hashlib.sha256(key).digest(), "big")
    order = np.argsort(np.random.PCG64(entropy).random_raw(n), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, eq=False)
class StepPlan:
    """All steps of a run: each is computed when asked for, none is stored."""

    stream: SampleStream
    """Which samples each step sees."""
    world_size: int
    """Ranks that the samples of a step are assigned to."""
    max_steps: int
    """The run ends after this many steps, counted from step 0 of the run."""
    micro_batches: int
    """Micro-batches of every rank in every step."""
    budget: int
    """The most tokens of a micro-batch."""
    tokens: Ints = field(repr=False)
    """Tokens of every sample of the split, by position."""
    costs: Floats = field(repr=False)
    """Work of every sample of the split (`cost`), by position."""

    def samples(self, step: int) -> Ints:
        """Return the positions in the split of the samples of `step`, in stream order."""
        return self.stream.samples(step)

    def ranks(self, step: int) -> list[list[MicroBatch]]:
        """Return the micro-batches of every rank."""
        return assign(
            self.samples(step), self.tokens, self.costs, self.world_size, self.budget, self.micro_batches
        )

    def micro_batches_of(self, step: int, rank: int) -> list[MicroBatch]:
        """Return the micro-batches of one rank, as many in every step."""
        return self.ranks(step)[rank]


def plan_steps(
    tokens: ArrayLike,
    costs: ArrayLike,
    stream: SampleStream,
    *,
    world_size: int,
    budget: int,
    max_steps: int,
) -> StepPlan:
    """Find the number of micro-batches that fits every step of `stream` up to `max_steps`.

    `tokens`, `costs`: of every sample of the split. `budget`: the most tokens of a micro-batch.
    Raises ConfigError with every reason why the steps cannot be assigned.
    """
    lengths = np.asarray(tokens, dtype=np.int64)
    first_step = stream.begin.step
    if problems := list(_impossible_steps(lengths, stream, world_size, budget, max_steps)):
        raise ConfigError(problems)
    micro_batches = most_micro_batches(
        lambda place: lengths[stream.samples(first_step + place)], max_steps - first_step, world_size, budget
    )
    return StepPlan(
        stream, world_size, max_steps, micro_batches, budget, lengths, np.asarray(costs, dtype=np.float64)
    )


def _impossible_steps(
    lengths: Ints, stream: SampleStream, world_size: int, budget: int, max_steps: int
) -> Iterator[str]:
    if world_size > stream.global_batch_size:
        yield (
            f"batch.global_batch_size: a step has fewer samples than there are processes "
            f"({stream.global_batch_size} < {world_size}); start at most {stream.global_batch_size} processes, "
            "or raise it"
        )
    if lengths.size == 0:
        yield "data.train: the split is empty (0 rows); choose another split"
    elif int(lengths.max()) > budget:
        yield too_long(int(lengths.max()), budget)
    if max_steps <= stream.begin.step:
        yield (
            "training.max_steps: there is no whole step left to train "
            f"({max_steps} in all, {stream.begin.step} taken); "
            "lower batch.global_batch_size, or raise training.num_train_epochs or training.max_steps"
        )
