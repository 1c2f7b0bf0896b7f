"""The step plan: which samples an optimizer step sees, which rank runs which of them, in which micro-batch.

Pure functions on numpy arrays: no torch, no process group, no files. Every rank computes the same answer from
the same arguments, so nothing has to be sent, and resuming at step k is arithmetic.

The *set* of samples of a step depends on (seed, dataset fingerprint, global batch size) alone. World size and
token budget decide only how that set is dealt (launch/planning/load_balance.py).
"""

import hashlib
import json
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from launch.errors import ConfigError
from launch.planning.load_balance import MicroBatch, assign, most_micro_batches, too_long

__all__ = ["MicroBatch", "StepPlan", "assign", "cost", "plan_steps", "step_samples", "steps_of"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# GFLOP of Qwen2-VL-7B (hidden 3584, 28 layers; vision tower 1280 wide, 32 blocks): the language model forward
# and backward to activations (the base is frozen: no weight gradients), the vision tower forward only.
_LINEAR_PER_TOKEN = 2 * 13.05
_ATTENTION_PER_TOKEN_SQUARED = (
    3 * 28 * 2 * 3584 * 1e-9
)  # causal: half of 4 * T * T * hidden a layer; backward is twice it
_VISION_PER_PATCH = 1.26
_VISION_PER_PATCH_SQUARED = 4 * 1280 * 32 * 1e-9
_PATCHES_PER_VISUAL_TOKEN = 4  # the merger folds 2 x 2 patches into one token


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


def steps_of(n: int, epochs: float, global_batch_size: int, first_sample: int = 0) -> tuple[int, int]:
    """Whole optimizer steps in `epochs` passes over `n` samples, and the samples left over after the last.

    `first_sample`: samples of these passes that were seen before the first of the steps.
    """
    samples = int(n * Fraction(str(epochs)))  # as written: 100 samples x 0.29 are 29, not 28.999...
    return divmod(max(0, samples - first_sample), global_batch_size)


def step_samples(
    step: int,
    *,
    n: int,
    global_batch_size: int,
    seed: int,
    fingerprint: str,
    first_step: int = 0,
    first_sample: int = 0,
) -> Ints:
    """Positions in the split of the samples of one step, in stream order; int64 [global_batch_size].

    Steps count from 0 and never end: the stream is one permutation per epoch after another. A step may lie
    across an epoch boundary, and may then hold one sample twice: once for each epoch. `first_step` sees the
    stream from position `first_sample` on: where a run went on with another global batch size.
    """
    if step < first_step or n < 1 or global_batch_size < 1:
        raise ValueError(f"step {step}, n {n}, global_batch_size {global_batch_size}: no such step")
    begin = first_sample + (step - first_step) * global_batch_size
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


@dataclass(frozen=True, eq=False)
class StepPlan:
    """All steps of a run: each is computed when asked for, none is stored.

    `micro_batches` is the number M of micro-batches of every rank in every step; `tokens` and `costs` are
    those of the whole split, by position.
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
    first_step: int = 0
    first_sample: int = 0

    def samples(self, step: int) -> Ints:
        """Positions in the split of the samples of `step`, in stream order."""
        return step_samples(
            step,
            n=self.n,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            fingerprint=self.fingerprint,
            first_step=self.first_step,
            first_sample=self.first_sample,
        )

    def ranks(self, step: int) -> list[list[MicroBatch]]:
        """The micro-batches of every rank."""
        return assign(
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
    first_step: int = 0,
    first_sample: int = 0,
) -> StepPlan:
    """Find the number of micro-batches that fits every step from `first_step` to `max_steps`.

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
        problems.append(too_long(int(lengths.max()), budget))
    if max_steps <= first_step:
        problems.append(
            f"training.max_steps: there is no whole step left to train ({max_steps} in all, {first_step} taken); "
            "lower batch.global_batch_size, or raise training.num_train_epochs or training.max_steps"
        )
    if problems:
        raise ConfigError(problems)

    def lengths_of(place: int) -> NDArray[np.int64]:
        samples = step_samples(
            first_step + place,
            n=lengths.size,
            global_batch_size=global_batch_size,
            seed=seed,
            fingerprint=fingerprint,
            first_step=first_step,
            first_sample=first_sample,
        )
        return lengths[samples]

    micro_batches = most_micro_batches(lengths_of, max_steps - first_step, world_size, budget)
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
        first_step=first_step,
        first_sample=first_sample,
    )
