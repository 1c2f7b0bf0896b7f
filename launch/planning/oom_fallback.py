"""Plans with other settings: where the GPU's memory becomes known, or was not enough; and what each strategy needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.planning.auto_settings import ChosenSettings, less_than, recomputation
from launch.planning.auto_strategy import resolve_strategy
from launch.planning.make_plan import choose_settings, planned_settings
from launch.planning.plan import Plan
from launch.planning.run_steps import balanced_steps
from launch.planning.step_plan import StreamOffset
from launch.planning.topology import Topology
from launch.strategies import AUTO, STRATEGIES
from launch.units import gib

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.recipe.schema import Recipe


def plan_on(recipe: Recipe, index: Index, plan: Plan, gpu_memory: int) -> Plan:
    """Return the plan with its settings chosen anew, for GPUs of a memory that was not known when it was made."""
    topology = replace(plan.topology, gpu_memory=gpu_memory)
    choice = choose_settings(recipe, index, topology, plan.begin)
    return replace(_with_choice(recipe, index, plan, choice, plan.settings.tried), gpu_memory=gpu_memory)


def plan_with_less(recipe: Recipe, index: Index, plan: Plan, *, reloading: bool) -> Plan | None:
    """Plan again with settings that need less, after a GPU ran out of memory; None when the recipe allows none.

    `reloading`: the weights will be loaded again, so that they may be held otherwise.
    """
    if not reloading:
        held = recipe.model.model_copy(update={"resident_weights": plan.settings.keep_dequantized})
        recipe = recipe.model_copy(update={"model": held})
    fixed = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"resident_weights": plan.settings.keep_dequantized}),
            "batch": recipe.batch.model_copy(update={"micro_batch_tokens": plan.micro_batch_tokens}),
            "training": recipe.training.model_copy(
                update={"gradient_checkpointing": plan.settings.activation_checkpoint_every}
            ),
        }
    )
    topology = replace(plan.topology, gpu_memory=None)
    now = choose_settings(fixed, index, topology, plan.begin).memory
    if now is None:
        return None
    if plan.settings.whole_layers:
        reason = "after a GPU ran out of memory: no decoder layer stays whole"
        return plan.with_settings(whole_layers=0, reason=reason, planned_memory=now.peak, tried=False)
    choice = choose_settings(recipe, index, replace(topology, gpu_memory=less_than(now)), plan.begin)
    if not choice.fits:
        return None
    choice = replace(choice, reason=f"after a GPU ran out of memory: {choice.reason}")
    return _with_choice(recipe, index, plan, choice, tried=False)


def _with_choice(recipe: Recipe, index: Index, plan: Plan, choice: ChosenSettings, tried: bool) -> Plan:
    """Return the plan with other settings and micro-batches; its count of failed attempts stays."""
    tokens = choice.micro_batch_tokens
    steps = balanced_steps(recipe, index, plan.world_size, tokens, plan.max_steps, plan.begin)
    return replace(
        plan,
        micro_batch_tokens=tokens,
        micro_batches=steps.micro_batches,
        settings=replace(planned_settings(choice), tried=tried, out_of_memory=plan.settings.out_of_memory),
    )


def memory_rows(recipe: Recipe, index: Index, topology: Topology) -> list[tuple[str, ...]]:
    """List, for each strategy of that many processes, (name, loading, training, settings, whether it fits, a note).

    The note says which one `auto` takes.
    """
    automatic = resolve_strategy(recipe, index, replace(topology, strategy=AUTO), StreamOffset()).strategy
    rows: list[tuple[str, ...]] = []
    for name, strategy in STRATEGIES.items():
        if strategy.is_one_process != (topology.world_size == 1):
            continue
        choice = choose_settings(recipe, index, replace(topology, strategy=name), StreamOffset())
        if (memory := choice.memory) is None:
            return []
        needs = f"needs {gib(memory.reserved)} with CUDA's own"
        fits = {True: "yes", False: f"no, {needs}", None: needs}[choice.fits]
        settings = ", ".join(
            [
                f"{choice.micro_batch_tokens:,} tokens",
                f"recomputed: {recomputation(choice.settings.activation_checkpoint_every)}",
                *(["held dequantized"] if choice.settings.keep_dequantized else []),
                *([f"{kept} layers whole"] if (kept := choice.settings.whole_layers) else []),
            ]
        )
        note = "recommended" if name == automatic else ""
        rows.append((name, gib(memory.loading), gib(memory.training), settings, fits, note))
    return rows
