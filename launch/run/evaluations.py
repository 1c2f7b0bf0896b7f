"""What `evaluations.jsonl` says of a run: its best evaluation, and whether it has stopped improving.

Everything follows from the file and the published checkpoints, nothing from memory: a run that was killed and goes on
comes to the same. Lines of steps that are taken again are gone by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.checkpoints.manifest import MANIFEST
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.untrusted_files import TABLE, UNREADABLE, parse_json, read_text

Metric = Literal["eval_loss", "accuracy"]
_KEYS = {"eval_loss": "loss", "accuracy": "accuracy"}  # metric -> its key in a line


@dataclass(frozen=True)
class Evaluation:
    """One line, of one metric. `gain`: larger is better."""

    step: int
    value: float
    gain: float


def metric_of(recipe: Recipe) -> Metric:
    """What tells a better evaluation from a worse one."""
    return recipe.checkpoint.keep_best or "eval_loss"


def read_evaluations(file: Path, metric: Metric) -> list[Evaluation]:
    """Every evaluation that has the metric, by step; what is no line of ours is passed over."""
    try:
        lines = read_text(file, TABLE).splitlines()
    except UNREADABLE:
        return []
    by_step: dict[int, Evaluation] = {}
    for line in lines:
        try:
            values = parse_json(line)
            step, value = int(values["step"]), float(values[_KEYS[metric]])
        except (ValueError, LookupError, TypeError):
            continue
        by_step[step] = Evaluation(step, value, -value if metric == "eval_loss" else value)
    return [by_step[step] for step in sorted(by_step)]


def best_of(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The best one; of equal ones the first. None without any."""
    return max(evaluations, key=lambda each: (each.gain, -each.step), default=None)


def is_best(evaluations: Sequence[Evaluation], step: int) -> bool:
    """The evaluation at a step is the best so far."""
    best = best_of(each for each in evaluations if each.step <= step)
    return best is not None and best.step == step


def stopped_improving(evaluations: Sequence[Evaluation], patience: int) -> int | None:
    """The first step with `patience` evaluations in a row, itself the last, none better than the best before them.

    None where there is none, or `patience` is 0.
    """
    best, since = None, 0
    for each in evaluations:
        if best is None or each.gain > best:
            best, since = each.gain, 0
        else:
            since += 1
        if patience and since >= patience:
            return each.step
    return None


def early_end(run: RunDirectory, recipe: Recipe) -> int | None:
    """The step at which the run ends because it stopped improving, as its recipe has it; None: at its last step."""
    patience = recipe.evaluation.early_stop
    if not patience:
        return None
    return stopped_improving(read_evaluations(run.evaluations_file, metric_of(recipe)), patience)


def best_checkpoint(run: RunDirectory, recipe: Recipe) -> Evaluation | None:
    """The best evaluation of those whose checkpoint is there; None where the recipe keeps none."""
    if recipe.checkpoint.keep_best is None:
        return None
    published = {folder for folder in run.checkpoints() if (folder / MANIFEST).is_file()}
    evaluations = read_evaluations(run.evaluations_file, recipe.checkpoint.keep_best)
    return best_of(each for each in evaluations if run.checkpoint(each.step) in published)
