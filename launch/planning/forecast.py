"""How long the steps of a plan take, by speeds measured once on a card and the exact tokens of every step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.inputs.families import read_shape
from launch.inputs.model_shape import ModelShape
from launch.planning.run_steps import stream_of
from launch.strategies import STRATEGIES

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.planning.plan import Plan
    from launch.planning.topology import Topology
    from launch.recipe.schema import Recipe

TOKENS_PER_SECOND = 16_206.0
"""Of one H100 (80 GB, SXM) with the 7B shape in 4 bits and the default settings; an H200 computes about as fast.

Samples of 795 tokens on average, random weights; 1,973 tokens a sample gave 13,244."""
_CARD = re.compile(r"H100.*HBM3|H200")
_SHAPE, _BATCH = (3584, 28, 5120), 32  # measured: Qwen2-VL-7B (Qwen2.5-VL has another tower), samples a step

EFFICIENCY = {
    ("single", 1): 1.0,
    **{("ddp", 2): 0.97, ("fsdp", 2): 0.91, ("zero3", 2): 0.87},
    **{("ddp", 4): 0.93, ("fsdp", 4): 0.78, ("zero3", 4): 0.41},
}
"""(strategy, GPUs of one machine) -> share of so many times one GPU's speed, measured with 32 samples a step."""


_WORTH_A_WORD = 0.15  # of the speed lost


def slower_than_fsdp(strategy: str, topology: Topology) -> str:
    """What was measured of a strategy that shares the layers out as fsdp does, and loses much more; else empty."""
    known = [gpus for name, gpus in EFFICIENCY if name == strategy and gpus <= topology.world_size]
    if topology.device != "cuda" or not known or not STRATEGIES[strategy].shards_layers:
        return ""
    gpus = max(known)
    own, fsdp = EFFICIENCY[strategy, gpus], EFFICIENCY["fsdp", gpus]
    if own >= 1 - _WORTH_A_WORD or own >= fsdp:
        return ""
    return f"fsdp is faster: {fsdp:.0%} of {gpus} GPUs' speed, {strategy} {own:.0%} (measured)"


@dataclass(frozen=True)
class Forecast:
    """The expected time and its cost. `cost`, `energy_kwh`: None where no price or watts were said."""

    card: str
    tokens: int
    tokens_per_second: float
    hours: float
    gpu_hours: float
    cost: float | None
    energy_kwh: float | None


def forecast_of(
    recipe: Recipe, index: Index, plan: Plan, card: str, price: float | None, watts: float | None
) -> Forecast | None:
    """Forecast the steps of a plan on GPUs named `card`; None where that card, model or layout is not tabled.

    `price`: of a GPU hour. `watts`: of one GPU. Loading, evaluations and saves are not counted.
    """
    shape, efficiency = read_shape(recipe), EFFICIENCY.get((plan.strategy, plan.world_size))
    if efficiency is None or plan.nodes != 1 or plan.device != "cuda" or not _CARD.search(card):
        return None
    if not _is_measured(shape, plan) or recipe.data.vision_cache != "off":
        return None
    tokens = tokens_of_steps(recipe, index, plan)
    speed = TOKENS_PER_SECOND * plan.world_size * efficiency
    hours = tokens / speed / 3600
    gpu_hours = hours * plan.world_size
    cost = None if price is None else gpu_hours * price
    energy = None if watts is None else gpu_hours * watts / 1000
    return Forecast(card, tokens, speed, hours, gpu_hours, cost, energy)


def tokens_of_steps(recipe: Recipe, index: Index, plan: Plan) -> int:
    """Count the tokens of all steps from the plan's first, text and visual tokens together."""
    stream, lengths = stream_of(recipe, plan), index.splits["train"].tokens
    return sum(int(lengths[stream.samples(step)].sum()) for step in range(plan.begin.step, plan.max_steps))


def _is_measured(shape: ModelShape | str, plan: Plan) -> bool:
    if isinstance(shape, str) or (shape.hidden, shape.layers, shape.vision_intermediate) != _SHAPE:
        return False
    return plan.load_in_4bit and plan.global_batch_size == _BATCH and plan.compute_dtype == "bfloat16"


def forecast_line(forecast: Forecast) -> str:
    """The forecast in one line."""
    parts = [f"{forecast.hours:,.2f} h", f"{forecast.gpu_hours:,.2f} GPU hours"]
    if forecast.cost is not None:
        parts.append(f"cost {forecast.cost:,.2f}")
    if forecast.energy_kwh is not None:
        parts.append(f"{forecast.energy_kwh:,.2f} kWh")
    return (
        f"forecast: {', '.join(parts)} for the {forecast.tokens:,} tokens of all steps, at a tabled "
        f"{forecast.tokens_per_second:,.0f} tokens/s for {forecast.card} (one H100, 7B, samples of 795 tokens, "
        "default settings; not measured here), without loading, evaluations and saves"
    )
