"""Where a run goes on: at its newest checkpoint that is whole, and of this recipe, data and base."""

from __future__ import annotations

import logging
from pathlib import Path

from launch.checkpoints.rotation import clear_unpublished
from launch.checkpoints.scan import Checkpoint, newest_valid
from launch.errors import CheckpointError
from launch.inputs.identity import recorded_identity, short
from launch.inputs.model_files import old_base_identity, old_kind
from launch.planning.plan import samples_consumed
from launch.recipe.fingerprint import altering_values
from launch.run.changes import Change, changes, consequences, content_changes, refuse_changes
from launch.run.continuation import planned_identity, refuse_lost_checkpoints
from launch.run.directory import RunDirectory, is_done_at
from launch.run.evaluations import early_end
from launch.run.lock import lock_holder
from launch.run.request_files import started_from_of
from trainer.metrics_log import keep_lines_until, read_lines
from trainer.pretrained import base_path
from trainer.task import Task

logger = logging.getLogger("trainer")


def resume_point(task: Task) -> Checkpoint | None:
    """Return the newest checkpoint whose files verify, or None for a new run; names what it passes over. On rank 0.

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
        refuse_different_run(task, newest)
    for folder in clear_unpublished(task.run.path):
        logger.info("%s: removed, it was never published", folder)
    return newest


def is_over(task: Task) -> bool:
    """Return whether the run of this recipe, data and base is finished, and nobody is changing it. On rank 0.

    Writes nothing. Raises as `resume_point` when what is asked for is another run than the one that ended.
    """
    end = early_end(task.run, task.recipe)
    if not is_done_at(task.run, task.plan.max_steps, end) or lock_holder(task.run.path) is not None:
        return False
    newest, _ = newest_valid(task.run.path)
    if newest is not None:
        refuse_different_run(task, newest)
    return True


def refuse_different_run(task: Task, checkpoint: Checkpoint) -> None:
    """Hold a checkpoint's facts against the plan.

    Raises:
        ConfigError: values differ that `--allow` does not name.
        CheckpointError: it lies beyond the end of the run, or before the change of its global batch size.
    """
    plan, facts = task.plan, checkpoint.metadata
    if "recipe" not in facts:
        raise CheckpointError(
            f"{checkpoint.folder}: its manifest does not say which recipe wrote it; it is of another version, "
            "choose another --name, or --fresh to move the old run aside"
        )
    contents = _content_changes(task, checkpoint)
    refuse_changes(
        [*changes(facts["recipe"], altering_values(task.recipe)), *contents],
        plan.allowed,
        str(checkpoint.folder),
    )
    for consequence in consequences(contents):
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


def _content_changes(task: Task, checkpoint: Checkpoint) -> list[Change]:
    """Compare data and base with what the checkpoint recorded of them; log what it did not record."""
    facts, now = checkpoint.metadata, planned_identity(task.plan)
    recorded = recorded_identity(facts)
    content_differences = content_changes(recorded, now)
    if not (missing := recorded.missing()):
        return content_differences
    old = facts.get("base_identity")  # of an older version; null where it was imported and not known
    compared = ""
    if old_kind(old) is not None:
        here = old_base_identity(Path(base_path(task.recipe)))
        compared = f", but for the base as far as it is recorded ({old_kind(old)} {short(str(old))})"
        if here != old:
            content_differences = [*content_differences, Change("model.content", old, here)]
    logger.info(
        "%s: does not record all that makes its run (an older version wrote it, or it was imported); not compared%s: "
        "%s; recorded from now on",
        checkpoint.folder,
        compared,
        ", ".join(missing),
    )
    return content_differences


def remove_later_metrics(run: RunDirectory, step: int) -> None:
    """Remove the figures of steps that will be taken again, and what damage did to those of the others."""
    lines = keep_lines_until(run.metrics_file, step)
    # A run that began with another's checkpoint has figures from the next step on.
    first = min(lines.steps, default=step + 1) if started_from_of(run) else 1
    for problem in (
        *lines.flaws(range(first, step + 1)),
        *keep_lines_until(run.evaluations_file, step).flaws(),
    ):
        logger.warning("%s", problem)


def has_ended_early(task: Task, step: int) -> bool:
    """Return whether the run ended early where it goes on after a kill: only its result is missing. On rank 0."""
    end = early_end(task.run, task.recipe)
    return end is not None and end <= step


def evaluation_is_missing(task: Task, step: int) -> bool:
    """Return whether a stop interrupted the evaluation at `step`, where the run goes on. On rank 0."""
    has_any = task.recipe.data.validation is not None
    due = (
        has_any
        and step > 0
        and (step % task.recipe.evaluation.every_steps == 0 or step == task.plan.max_steps)
    )
    return due and all(line["step"] != step for line in read_lines(task.run.evaluations_file))
