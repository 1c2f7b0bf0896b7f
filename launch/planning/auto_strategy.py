"""`--strategy auto`: the strategy of a request that names none, by what fits the GPUs. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.planning.auto_settings import ChosenSettings
from launch.planning.make_plan import choose_settings
from launch.rules.checks import topology_violations
from launch.strategies import AUTO, STRATEGIES, default_strategy
from launch.units import gib

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.planning.step_plan import StreamOffset
    from launch.planning.topology import Topology
    from launch.recipe.schema import Recipe

_SHARDED = STRATEGIES["fsdp"]


def resolve_strategy(recipe: Recipe, index: Index, topology: Topology, begin: StreamOffset) -> Topology:
    """Put a strategy and its reason in the place of `AUTO`; another topology is returned as it is.

    `single` for one process, `ddp` where some settings of the recipe fit the smallest GPU, else `fsdp`, unless a rule
    refuses that. Arithmetic on the request alone, so whoever asks gets the same answer.
    """
    if topology.strategy != AUTO:
        return topology
    default = default_strategy(topology.world_size).name
    if topology.world_size == 1:
        return replace(topology, strategy=default, strategy_reason="one process")
    if topology.device != "cuda":
        return replace(
            topology, strategy=default, strategy_reason="no GPU here, so nothing has to be shared out"
        )
    whole = replace(topology, strategy=default)
    choice = choose_settings(recipe, index, whole, begin)
    if choice.fits is None:
        return replace(
            whole, strategy_reason=f"what fits cannot be planned: {_why_unknown(choice, topology)}"
        )
    assert choice.memory is not None
    assert topology.gpu_memory is not None
    need = f"{default} needs {gib(choice.memory.reserved)} of {gib(topology.gpu_memory)}"
    if choice.fits:
        return replace(whole, strategy_reason=need)
    sharded = replace(topology, strategy=_SHARDED.name)
    if broken := topology_violations(
        recipe,
        sharded.strategy,
        sharded.nodes,
        sharded.gpus_per_node,
        device=sharded.device,
        packages_here=sharded.packages_here,
    ):
        return replace(whole, strategy_reason=f"{need}, and {_SHARDED.name} is refused ({broken[0]})")
    least = choose_settings(recipe, index, sharded, begin).memory
    assert least is not None
    return replace(sharded, strategy_reason=f"{need}, {_SHARDED.name} {gib(least.reserved)}")


def _why_unknown(choice: ChosenSettings, topology: Topology) -> str:
    return choice.reason if topology.gpu_memory else "the memory of the GPUs is not known"
