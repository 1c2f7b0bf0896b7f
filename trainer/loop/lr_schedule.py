"""The learning rate where a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from launch.checkpoints.manifest import read_manifest
from trainer.task import Task

logger = get_logger("trainer")


def enter_schedule(scheduler: Any, groups: Sequence[dict[str, Any]], step: int) -> float:
    """Set the optimizer's groups to the learning rate that the schedule has at `step`; returns it."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    for group, rule, base in zip(groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True):
        group["lr"] = base * rule(step)
    rate: float = groups[0]["lr"]
    return rate


def say_another_rate(task: Task, checkpoint: Path, step: int, rate: float) -> None:
    """Before the first step of a run that was extended, or has another schedule."""
    before = read_manifest(checkpoint)["facts"]["learning_rate"]
    if rate != before:
        known = "another schedule" if before is None else f"{before:.4g}"
        logger.warning(
            f"the learning rate goes on at {rate:.4g} where the checkpoint's schedule had {known}: "
            f"{task.recipe.training.lr_scheduler_type} over {task.plan.max_steps} steps, at step {step}"
        )
