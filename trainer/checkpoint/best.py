"""The best evaluation of a run: its checkpoint is saved and stays, and its adapter is written when the run is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from launch.atomic_files import atomic_dir
from launch.checkpoints.adapter_file import is_whole
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.evaluations import (
    best_checkpoint,
    best_of,
    early_end,
    is_best,
    metric_of,
    read_evaluations,
)
from launch.untrusted_files import UNREADABLE, read_mapping
from trainer.distributed.collectives import broadcast_from_main
from trainer.export.adapter import read_adapter
from trainer.export.consolidate import write_adapter
from trainer.task import Task

logger = get_logger("trainer")
RECORD = "best.json"


@dataclass(frozen=True)
class Verdict:
    """On an evaluation: it is saved as the best so far; the run ends with it."""

    is_best: bool = False
    ends: bool = False


def judge_evaluation(task: Task, step: int) -> Verdict:
    """What the evaluation at a step, whose line is written, means for the run. A collective."""
    recipe, run = task.recipe, task.run
    if recipe.checkpoint.keep_best is None and not recipe.evaluation.early_stop:
        return Verdict()
    return broadcast_from_main(lambda: _judge(run, recipe, step, task.plan.max_steps))


def _judge(run: RunDirectory, recipe: Recipe, step: int, max_steps: int) -> Verdict:
    metric = metric_of(recipe)
    evaluations = [each for each in read_evaluations(run.evaluations_file, metric) if each.step <= step]
    saves = recipe.checkpoint.keep_best is not None and is_best(evaluations, step)
    end = early_end(run, recipe)
    ends = end is not None and end <= step < max_steps
    best = best_of(evaluations)
    if ends and best is not None:
        logger.info(
            f"evaluation.early_stop: no gain in {recipe.evaluation.early_stop} evaluations (best {metric} "
            f"{best.value:.4g} at step {best.step}); the run ends at step {step} of {max_steps}"
        )
    return Verdict(saves, ends)


def protected_steps(task: Task) -> set[int]:
    """The step whose checkpoint is the best of those that are there."""
    best = best_checkpoint(task.run, task.recipe)
    return set() if best is None else {best.step}


def write_best_adapter(task: Task, beside: Callable[[Path], object]) -> None:
    """Write `adapter-best/`, replacing an older one whole; nothing where it is there. On rank 0, when all is saved.

    `beside`: writes into a folder what belongs beside an adapter.
    """
    best = best_checkpoint(task.run, task.recipe)
    if best is None:
        return
    folder = task.run.best_adapter
    record: dict[str, Any] = {
        "step": best.step,
        "metric": task.recipe.checkpoint.keep_best,
        "value": best.value,
    }
    if is_whole(folder) and _record_of(folder) == record:
        return
    with atomic_dir(folder) as aside:
        write_adapter(read_adapter(task.run.checkpoint(best.step)), aside)
        beside(aside)
        (aside / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
    logger.info(f"{folder}: the adapter of step {best.step} ({record['metric']} {best.value:.4g})")


def _record_of(folder: Path) -> dict[str, Any]:
    try:
        return read_mapping(folder / RECORD)
    except UNREADABLE:
        return {}
