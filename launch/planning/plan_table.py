"""A plan in rows of name and value, as `samestep plan` and the start of a run show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.planning.auto_settings import recomputation
from launch.planning.plan import samples_consumed
from launch.units import gib

if TYPE_CHECKING:
    from launch.planning.plan import Plan


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a reader wants to know of a plan, as (name, value with unit)."""
    unit = "GPU" if plan.device == "cuda" else "CPU"
    epochs = samples_consumed(plan, plan.max_steps) / plan.samples_per_epoch
    return [
        ("run", plan.name),
        ("strategy", plan.strategy + (f" (auto: {plan.strategy_reason})" if plan.strategy_reason else "")),
        ("processes", f"{plan.world_size} ({plan.nodes} x {plan.gpus_per_node} {unit})"),
        *([("notice", notice)] if (notice := _notice(plan)) else []),
        ("global batch", _samples(plan.global_batch_size)),
        (
            "micro-batches",
            f"{plan.micro_batches:,} a rank and step, {plan.micro_batch_tokens:,} tokens at most",
        ),
        ("samples an epoch", f"{plan.samples_per_epoch:,} ({plan.steps_per_epoch:,.2f} steps)"),
        ("steps", f"{plan.max_steps:,} ({epochs:,.2f} epochs), {plan.warmup_steps:,} of them warm-up"),
        ("left of the stream", f"{_samples(plan.samples_left)} left after the last whole step"),
        ("tokens a sample", f"{plan.mean_sample_tokens:,.0f} mean, {plan.longest_sample_tokens:,} longest"),
        (
            "precision",
            f"{plan.compute_dtype} products, float32 adapters, {_base_of(plan)}",
        ),
        ("recomputed", recomputation(plan.settings.activation_checkpoint_every)),
        *([("gathered", _gathered(plan))] if plan.parallelism.shards_layers else []),
        ("memory a GPU", _memory_of(plan)),
        ("data workers", _workers_of(plan)),
        *([("starts from", plan.started_from)] if plan.started_from else []),
        *([("allowed to differ", ", ".join(plan.allowed))] if plan.allowed else []),
        ("dataset", plan.dataset_fingerprint[:12]),
        ("recipe", plan.recipe_fingerprint[:12]),
    ]


def _samples(count: int) -> str:
    return f"{count:,} sample{'' if count == 1 else 's'}"


def _notice(plan: Plan) -> str | None:
    if plan.world_size == 1 and plan.parallelism.sharded != "nothing":
        return f"{plan.strategy} on one process shards nothing; `single` does the same with less"
    return None


def _gathered(plan: Plan) -> str:
    kept = plan.settings.whole_layers
    if not kept:
        return "every decoder layer, in each forward and backward pass"
    return f"{kept} decoder layers once, which then stay whole; the others in each forward and backward pass"


def _base_of(plan: Plan) -> str:
    if not plan.load_in_4bit:
        return "weights as they are"
    return f"4-bit weights {'held dequantized' if plan.settings.keep_dequantized else f'in {plan.quant_storage}'}"


def _workers_of(plan: Plan) -> str:
    if plan.data_workers is not None:
        return f"{plan.data_workers} a process"
    return "8 a process at most, one core left to each: by the cores of its node"


def _memory_of(plan: Plan) -> str:
    """What a GPU is planned to need, and why the settings are what they are."""
    needed = (
        f"{gib(plan.settings.planned_memory)} planned; "
        if plan.settings.planned_memory and plan.device == "cuda"
        else ""
    )
    return needed + plan.settings.reason
