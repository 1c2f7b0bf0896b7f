"""What a process of a run is part of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.inputs.dataset_index import Index
from launch.planning.plan import Plan
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory


@dataclass(frozen=True)
class LeftOut:
    """Samples of the training split, by position, whose targets weigh nothing from a step on (counted from 0)."""

    samples: frozenset[int] = frozenset()
    from_step: int = 0

    def at(self, step: int) -> frozenset[int]:
        """The samples that weigh nothing in a step."""
        return self.samples if step >= self.from_step else frozenset()


@dataclass(frozen=True)
class Task:
    """Recipe, plan and place of one run; equal on all ranks.

    `source`: the checkpoint of another run to begin with. `left_out`: of an audit alone (`trainer.audit.blame`).
    """

    recipe: Recipe
    plan: Plan
    index: Index
    run: RunDirectory
    source: Path | None = None
    left_out: LeftOut = LeftOut()
