"""The plan of a run's next attempt: what `samestep run` and a plain launch of the trainer both derive, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from launch.planning.auto_strategy import resolve_strategy
from launch.planning.make_plan import make_plan
from launch.run.continuation import plan_to_keep, refuse_an_end_behind, refuse_another_identity
from launch.run.request_files import old_plan

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.inputs.identity import RunIdentity
    from launch.planning.plan import Plan
    from launch.planning.topology import Topology
    from launch.recipe.schema import Recipe
    from launch.rules.accelerate_config import LaunchConfig
    from launch.run.changes import Change
    from launch.run.continuation import Continuation
    from launch.run.directory import RunDirectory


def plan_attempt(
    run: RunDirectory,
    recipe: Recipe,
    index: Index,
    identity: RunIdentity,
    topology: Topology,
    continuation: Continuation,
    *,
    allow: Sequence[str],
    name: str,
    config: LaunchConfig | None = None,
) -> tuple[Plan, tuple[Change, ...]]:
    """The plan of a run that goes on as `continuation` says, and everything that differs from before and may.

    `run`: what was begun before under its name; `name`: of the run to be; `allow`: of this request alone; `config`: of
    a launch under way. An earlier attempt's settings stay where hardware, data and recipe are the same. Writes nothing.

    Raises:
        ConfigError: data or base are others than those of `run`, a rule is broken, or the run is beyond its new end.
        CheckpointError: the checkpoint to begin with is damaged.
    """
    source = continuation.source
    # A run with checkpoints of its own has the contents that were allowed earlier in its plan; another's has not.
    allowed = continuation.allowed if source else allow
    other_contents = refuse_another_identity(run, identity, allowed, source)
    resolved = resolve_strategy(recipe, index, topology, continuation.begin)
    plan = make_plan(
        recipe,
        index,
        _compared_with(old_plan(run), resolved),
        name=name,
        config=config,
        before=plan_to_keep(run, recipe, resolved, index.fingerprint),
        history=continuation,
        identity=identity,
    )
    refuse_an_end_behind(run, plan.max_steps, source)
    return plan, (*continuation.changed, *other_contents)


def _compared_with(old: Plan | None, topology: Topology) -> Topology:
    """The topology whose reason also says which strategy the run had, where `auto` takes another one now."""
    if old is None or not topology.strategy_reason or old.strategy == topology.strategy:
        return topology
    before = f"the run had {old.strategy} on {old.world_size} process{'es' if old.world_size > 1 else ''}"
    return replace(topology, strategy_reason=f"{topology.strategy_reason}; {before}")
