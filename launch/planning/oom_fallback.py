"""Plans with other settings: where the GPU's memory becomes known, or was not enough; and what each strategy needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launch.planning.auto_settings import ChosenSettings, less_than, recomputation
from launch.planning.plan import Hardware, Plan, balanced_steps, choose_settings, peak_of
from launch.strategies import STRATEGIES
from launch.units import gib

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.recipe.schema import Recipe


def plan_on(recipe: Recipe, index: Index, plan: Plan, gpu_memory: int) -> Plan:
    """A plan with its settings chosen anew, for GPUs of a memory that was not known when it was made."""
    where = Hardware(plan.strategy, plan.world_size, plan.device, gpu_memory)
    chosen = choose_settings(recipe, index, where, plan.begin)
    return replace(_with_choice(recipe, index, plan, chosen), gpu_memory=gpu_memory)


def plan_with_less(recipe: Recipe, index: Index, plan: Plan, *, reloading: bool) -> Plan | None:
    """After a GPU ran out of memory: the plan with settings that need less of it; None when the recipe allows none.

    `reloading`: the weights will be loaded again, so that they may be held otherwise.
    """
    if not reloading:
        held = recipe.model.model_copy(update={"resident_weights": plan.resident_weights})
        recipe = recipe.model_copy(update={"model": held})
    fixed = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"resident_weights": plan.resident_weights}),
            "batch": recipe.batch.model_copy(update={"micro_batch_tokens": plan.micro_batch_tokens}),
            "training": recipe.training.model_copy(update={"gradient_checkpointing": plan.recompute_every}),
        }
    )
    where = Hardware(plan.strategy, plan.world_size, plan.device)
    now = choose_settings(fixed, index, where, plan.begin).memory
    if now is None:
        return None
    chosen = choose_settings(recipe, index, replace(where, gpu_memory=less_than(now)), plan.begin)
    if not chosen.fits:
        return None
    chosen = replace(chosen, reason=f"after a GPU ran out of memory: {chosen.reason}")
    return replace(_with_choice(recipe, index, plan, chosen), settings_tried=False)


def _with_choice(recipe: Recipe, index: Index, plan: Plan, chosen: ChosenSettings) -> Plan:
    tokens = chosen.micro_batch_tokens
    steps = balanced_steps(recipe, index, plan.world_size, tokens, plan.max_steps, plan.begin)
    return replace(
        plan,
        micro_batch_tokens=tokens,
        micro_batches=steps.micro_batches,
        resident_weights=chosen.settings.resident_weights,
        recompute_every=chosen.settings.recompute_every,
        settings_reason=chosen.reason,
        planned_memory=peak_of(chosen),
    )


def memory_rows(recipe: Recipe, index: Index, where: Hardware) -> list[tuple[str, ...]]:
    """For each strategy of that many processes: (name, loading, training, settings, whether it fits)."""
    rows: list[tuple[str, ...]] = []
    for name, strategy in STRATEGIES.items():
        if strategy.is_one_process != (where.world_size == 1):
            continue
        chosen = choose_settings(recipe, index, replace(where, strategy=name))
        if (memory := chosen.memory) is None:
            return []
        needs = f"needs {gib(memory.reserved)}"
        fits = {True: "yes", False: f"no, {needs}", None: needs}[chosen.fits]
        settings = ", ".join(
            [
                f"{chosen.micro_batch_tokens:,} tokens",
                f"recomputed: {recomputation(chosen.settings.recompute_every)}",
                *(["held dequantized"] if chosen.settings.resident_weights else []),
            ]
        )
        rows.append((name, gib(memory.loading), gib(memory.training), settings, fits))
    return rows
