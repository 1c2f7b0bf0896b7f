"""Where a run goes on: at its newest checkpoint that is whole, and of this recipe, data and base."""

from __future__ import annotations

import logging
from typing import Any

from launch.changes import CONTENT_KEYS, changes, consequences, refuse_changes
from launch.errors import CheckpointError
from launch.plan import samples_consumed
from launch.recipe import altering_values
from launch.rotation import clear_unpublished
from launch.run_directory import RunDirectory, is_done_at, lock_holder
from launch.runs import refuse_lost_checkpoints
from launch.survey import Checkpoint, newest_valid
from trainer.records import keep_lines_until, read_lines
from trainer.task import Task

logger = logging.getLogger("trainer")


def resume_point(task: Task) -> Checkpoint | None:
    """The newest checkpoint whose files verify, or None for a new run; names what it passes over. On rank 0.

    Raises:
        ConfigError: it was written by a run that differs in values that are not allowed to.
        CheckpointError: every published checkpoint is damaged, or the newest lies outside the plan's steps.
    """
    newest, passed_over = newest_valid(task.run.path)
    for checkpoint in passed_over:
        for problem in checkpoint.problems:
            logger.warning("passed over: %s", problem)
    if newest is None:
        refuse_lost_checkpoints(task.run, passed_over, task.plan.begin.step)
    else:
        refuse_another_run(task, newest)
    for folder in clear_unpublished(task.run.path):
        logger.info("%s: removed, it was never published", folder)
    return newest


def is_over(task: Task) -> bool:
    """The run of this recipe, data and base has taken its last step, and nobody is changing it. On rank 0.

    Writes nothing. Raises as `resume_point` when what is asked for is another run than the one that ended.
    """
    if not is_done_at(task.run, task.plan.max_steps) or lock_holder(task.run.path) is not None:
        return False
    newest, _ = newest_valid(task.run.path)
    if newest is not None:
        refuse_another_run(task, newest)
    return True


def refuse_another_run(task: Task, checkpoint: Checkpoint) -> None:
    """Hold a checkpoint's facts against the plan.

    Raises:
        ConfigError: values differ that `--allow` does not name.
        CheckpointError: it lies beyond the end of the run, or before the change of its global batch size.
    """
    plan, facts = task.plan, checkpoint.facts
    if "recipe" not in facts:
        raise CheckpointError(
            f"{checkpoint.folder}: its manifest does not say which recipe wrote it; it is of another version, "
            "choose another --name, or --fresh to move the old run aside"
        )
    old = {**facts["recipe"], **dict(zip(CONTENT_KEYS, _contents(facts, task.base), strict=True))}
    here = (plan.dataset_fingerprint, task.base)
    new = {**altering_values(task.recipe), **dict(zip(CONTENT_KEYS, here, strict=True))}
    found = changes(old, new)
    refuse_changes(found, plan.allowed, str(checkpoint.folder))
    for consequence in consequences([change for change in found if change.key in CONTENT_KEYS]):
        logger.warning("allowed: %s", consequence)
    if checkpoint.step > plan.max_steps:
        raise CheckpointError(
            f"{checkpoint.folder}: lies beyond the end of the run ({checkpoint.step} > {plan.max_steps} steps); "
            "raise training.max_steps or training.num_train_epochs, or choose another --name"
        )
    expected = samples_consumed(plan, checkpoint.step)
    if checkpoint.step < plan.begin.step or facts["samples_consumed"] != expected:
        raise CheckpointError(
            f"{checkpoint.folder}: has seen {facts['samples_consumed']:,} samples where the plan counts {expected:,}: "
            f"the global batch size changed at step {plan.begin.step}; run the same `samestep run` again with "
            "--allow batch.global_batch_size to plan from this checkpoint"
        )


def _contents(facts: dict[str, Any], base: str) -> tuple[object, object]:
    """Of data and base. What was taken over does not know its base (null), so that cannot differ from `base`."""
    return facts.get("dataset_fingerprint"), facts.get("base_identity") or base


def forget_after(run: RunDirectory, step: int) -> None:
    """Remove the figures of steps that will be taken again."""
    keep_lines_until(run.metrics_file, step)
    keep_lines_until(run.evaluations_file, step)


def evaluation_is_missing(task: Task, step: int) -> bool:
    """A stop cut the evaluation at `step` short, where the run goes on. On rank 0."""
    due = step > 0 and (step % task.recipe.evaluation.every_steps == 0 or step == task.plan.max_steps)
    return due and all(line["step"] != step for line in read_lines(task.run.evaluations_file))
