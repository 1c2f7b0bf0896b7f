"""What a process of a run is part of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.inputs.dataset_index import Index
from launch.planning.plan import Plan
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory


@dataclass(frozen=True)
class Task:
    """Recipe, plan and place of one run; equal on all ranks.

    `source`: the checkpoint of another run to begin with.
    """

    recipe: Recipe
    plan: Plan
    index: Index
    run: RunDirectory
    source: Path | None = None
