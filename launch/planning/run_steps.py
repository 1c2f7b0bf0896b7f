"""The steps of a run: how many there are, which samples they see, and what an evaluation sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.errors import ConfigError
from launch.planning.step_plan import SampleStream, StepPlan, StreamOffset, cost, plan_steps, steps_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launch.inputs.dataset_index import Index, Split
    from launch.planning.plan import Plan
    from launch.recipe.schema import Recipe


MOST_STEPS = 1_000_000
"""A plan of so many takes a minute."""


def work_of_samples(split: Split) -> NDArray[np.float64]:
    """The work of every sample of a split (`step_plan.cost`)."""
    return cost(split.text_tokens, split.visual_tokens, split.visual_squares, split.prefix_tokens)


def sample_stream(recipe: Recipe, index: Index, begin: StreamOffset) -> SampleStream:
    """Return the stream of the training split that the steps of a recipe see."""
    return SampleStream(
        n=len(index.splits["train"]),
        global_batch_size=recipe.batch.global_batch_size,
        seed=recipe.training.seed,
        fingerprint=index.fingerprint,
        begin=begin,
    )


def balanced_steps(
    recipe: Recipe, index: Index, world_size: int, budget: int, max_steps: int, begin: StreamOffset
) -> StepPlan:
    """Find the step plan with the fewest micro-batches of a budget in tokens. ConfigError as `plan_steps`."""
    train = index.splits["train"]
    return plan_steps(
        train.tokens,
        work_of_samples(train),
        sample_stream(recipe, index, begin),
        world_size=world_size,
        budget=budget,
        max_steps=max_steps,
    )


def stream_of(recipe: Recipe, plan: Plan) -> SampleStream:
    """Return the stream of a plan: as `sample_stream`, without the index."""
    return SampleStream(
        n=plan.samples_per_epoch,
        global_batch_size=plan.global_batch_size,
        seed=recipe.training.seed,
        fingerprint=plan.dataset_fingerprint,
        begin=plan.begin,
    )


def step_plan(recipe: Recipe, index: Index, plan: Plan) -> StepPlan:
    """Return the step plan of a plan: no search, `plan.micro_batches` was computed when the plan was made."""
    train = index.splits["train"]
    return StepPlan(
        stream=stream_of(recipe, plan),
        world_size=plan.world_size,
        max_steps=plan.max_steps,
        micro_batches=plan.micro_batches,
        budget=plan.micro_batch_tokens,
        tokens=train.text_tokens + train.visual_tokens,
        costs=work_of_samples(train),
    )


def validation_samples(recipe: Recipe, index: Index) -> NDArray[np.int64]:
    """Pick the positions in the validation split that an evaluation sees: at most `max_samples`, spread evenly."""
    import numpy as np

    count = len(index.splits["validation"])
    seen = min(recipe.evaluation.max_samples, count)
    return np.linspace(0, max(0, count - 1), seen).round().astype(np.int64)


def whole_steps(recipe: Recipe, samples: int, begin: StreamOffset) -> tuple[int, int]:
    """Count the optimizer steps of the run, and the samples of `num_train_epochs` left after the last whole step.

    `training.max_steps` wins over the epochs, as in transformers; the stream then goes on as long as needed.
    ConfigError above `MOST_STEPS`: every one is looked at.
    """
    training = recipe.training
    if training.max_steps >= 1:
        key, steps, left = "max_steps", training.max_steps, 0
    else:
        key = "num_train_epochs"
        steps, left = steps_of(
            samples, training.num_train_epochs, recipe.batch.global_batch_size, begin.sample
        )
        steps += begin.step
    if steps > MOST_STEPS:
        raise ConfigError(
            f"training.{key}: makes more than {MOST_STEPS:,} steps, which are planned one by one; give fewer"
        )
    return steps, left


def longest_of(index: Index) -> int:
    """Count the tokens of the longest sample of all splits."""
    return max((int(split.tokens.max()) for split in index.splits.values() if len(split)), default=0)


def least_budget(recipe: Recipe, longest: int) -> int:
    """Return the fewest tokens that a micro-batch may be planned with."""
    budget = recipe.batch.micro_batch_tokens
    return longest if budget == "auto" else budget
