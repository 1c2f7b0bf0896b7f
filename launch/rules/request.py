"""What a rule judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from launch.recipe.schema import Recipe
from launch.rules.accelerate_config import LaunchConfig, shipped_config
from launch.strategies import STRATEGIES, Strategy


@dataclass(frozen=True)
class PlanRequest:
    """What somebody wants to run, and the facts of the prepared data that can forbid it.

    `samples`: of the training split; `max_steps`: whole steps; `budget`: most tokens of a micro-batch;
    `longest`: tokens of the longest sample of the training and validation splits; `config`: of the launch, the
    shipped file's by default; `capability`: of the GPUs that will be used, None where that is not known; `device`:
    `cuda` or `cpu`, empty where that is not known; `packages_here`: what will run are this Python's packages.
    """

    recipe: Recipe
    strategy: str
    nodes: int
    gpus_per_node: int
    samples: int
    max_steps: int
    budget: int
    longest: int
    config: LaunchConfig | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    quant_storage: str = ""
    device: str = ""
    packages_here: bool = True

    @property
    def launch(self) -> LaunchConfig:
        """What accelerate will be asked for."""
        return self.config or shipped_config(self.strategy)

    @property
    def parallelism(self) -> Strategy:
        """What `strategy` names. An unknown name is refused by `strategy_is_available`; the others judge it as ddp."""
        return STRATEGIES.get(self.strategy, STRATEGIES["ddp"])

    @property
    def world_size(self) -> int:
        """All processes, of all nodes."""
        return self.nodes * self.gpus_per_node


Rule = Callable[[PlanRequest], str | None]
