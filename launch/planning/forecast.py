"""How long the steps of a plan take, from the exact tokens of every step and a speed: measured here, or tabled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.inputs.families import read_shape
from launch.inputs.model_shape import ModelShape
from launch.planning.run_steps import stream_of
from launch.planning.speeds import Speed, read_speeds, speed_key, work_of_steps

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.planning.plan import Plan
    from launch.recipe.schema import Recipe

WORK_PER_SECOND = 612_000.0
"""Of one H200 with the 7B shape in 4 bits and the default settings, in the unit of `step_plan.cost`.

Measured with random weights and samples of 801 and 808 tokens on average: 587,000 to 638,000 in seven runs on as many
machines (benchmarks/NOTES.md), of which this is the middle; 20,900 tokens a second where samples share a prefix of 104.
"""
H100_SHARE = 0.96
"""An H100 (SXM) beside it, by the data sheets: the same chip, whose memory gives 3,352 of 4,800 GB/s. A tenth of a
step's kernels wait for memory. Not measured with these kernels; an older version took 16,200 tokens a second there."""
_BESIDE = "7B, samples of 801 tokens, default settings"
TABLED = f"tabled (one H200, {_BESIDE}; not measured here)"
SCALED = f"scaled from one H200 to an H100 by the data sheets ({_BESIDE}; not measured on one)"
_CARDS = (
    (re.compile(r"\bH200(?! NVL)"), WORK_PER_SECOND, TABLED),
    (re.compile(r"H100.*HBM3"), H100_SHARE * WORK_PER_SECOND, SCALED),
)
_SHAPE, _BATCH = (3584, 28, 5120), 32  # measured: Qwen2-VL-7B (Qwen2.5-VL has another tower), samples a step

EFFICIENCY = {
    ("single", 1): 1.0,
    **{("ddp", 2): 0.975, ("fsdp", 2): 0.955, ("zero3", 2): 0.945},
    **{("ddp", 4): 0.92, ("fsdp", 4): 0.90, ("zero3", 4): 0.89},
}
"""(strategy, GPUs of one machine) -> share of so many times one GPU's speed, with 32 samples a step on H200s.

Measured on 2. On 4, ddp was measured in an older version, without prefix sharing, which costs each GPU 1 % more there;
fsdp and zero3 were measured in one which gathered every layer in every pass: here they lose to ddp what they lose to it
on 2.
"""

Layout = tuple[str, int, int]
"""(strategy, processes in all, nodes)."""


@dataclass(frozen=True)
class Forecast:
    """The expected time of a plan's steps in one layout, and its cost. `source`: where the speed is from.

    `cost`, `energy_kwh`: None where no price or watts were said.
    """

    card: str
    strategy: str
    world_size: int
    nodes: int
    source: str
    tokens: int
    tokens_per_second: float
    hours: float
    gpu_hours: float
    cost: float | None
    energy_kwh: float | None


def forecasts(
    recipe: Recipe, index: Index, plan: Plan, card: str, price: float | None, watts: float | None
) -> list[Forecast]:
    """Forecast the steps of a plan on cards named `card`: in its own layout first, then in every other that is known.

    `price`: of a GPU hour. `watts`: of one GPU. Loading, evaluations and saves are not counted. Empty where nothing is
    known of the card.
    """
    if not card:
        return []
    own = plan.strategy, plan.world_size, plan.nodes
    speeds = [each for each in read_speeds() if (each.recipe, each.card) == (speed_key(recipe), card)]
    others = {(name, gpus, 1) for name, gpus in EFFICIENCY} if plan.device == "cuda" else set()
    others |= {(each.strategy, each.world_size, each.nodes) for each in speeds}
    layouts = [own, *sorted(others - {own}, key=lambda layout: (layout[1], layout[0]))]
    layouts = [layout for layout in layouts if layout[1] <= plan.global_batch_size]
    tokens = tokens_of_steps(recipe, index, plan)
    work = work_of_steps(recipe, index, plan, plan.begin.step + 1, plan.max_steps)
    shape = read_shape(recipe)
    known = []
    for layout in layouts:
        if timed := _seconds(recipe, plan, shape, card, speeds, layout, work):
            known.append(_forecast(card, layout, tokens, *timed, price, watts))
    return known


def tokens_of_steps(recipe: Recipe, index: Index, plan: Plan) -> int:
    """Count the tokens of all steps from the plan's first, text and visual tokens together."""
    stream, lengths = stream_of(recipe, plan), index.splits["train"].tokens
    return sum(int(lengths[stream.samples(step)].sum()) for step in range(plan.begin.step, plan.max_steps))


def _seconds(
    recipe: Recipe,
    plan: Plan,
    shape: ModelShape | str,
    card: str,
    speeds: Sequence[Speed],
    layout: Layout,
    work: float,
) -> tuple[float, str] | None:
    """(seconds of the steps, where that is from): measured in this layout, in another one, or tabled."""
    measured = {(each.strategy, each.world_size, each.nodes): each for each in speeds}
    if speed := measured.get(layout):
        return work / speed.work_per_second, f"measured here over {speed.steps} steps"
    efficiency = EFFICIENCY.get(layout[:2]) if layout[2] == 1 and plan.device == "cuda" else None
    if efficiency is None:
        return None
    tabled = [each for each in measured if each[2] == 1 and each[:2] in EFFICIENCY]
    if tabled:
        nearest = min(tabled, key=lambda each: abs(each[1] - layout[1]))
        whole = measured[nearest].work_per_second / (nearest[1] * EFFICIENCY[nearest[:2]])
        from_layout = f"measured here on {nearest[0]} x {nearest[1]}, scaled by tabled efficiencies"
        return work / (whole * layout[1] * efficiency), from_layout
    if not _is_measured(shape, plan) or recipe.data.vision_cache != "off":
        return None
    return next(
        (
            (work / (speed * layout[1] * efficiency), source)
            for pattern, speed, source in _CARDS
            if pattern.search(card)
        ),
        None,
    )


def _forecast(
    card: str,
    layout: Layout,
    tokens: int,
    seconds: float,
    source: str,
    price: float | None,
    watts: float | None,
) -> Forecast:
    hours = seconds / 3600
    gpu_hours = hours * layout[1]
    cost = None if price is None else gpu_hours * price
    energy = None if watts is None else gpu_hours * watts / 1000
    return Forecast(card, *layout, source, tokens, tokens / seconds, hours, gpu_hours, cost, energy)


def _is_measured(shape: ModelShape | str, plan: Plan) -> bool:
    if isinstance(shape, str) or (shape.hidden, shape.layers, shape.vision_intermediate) != _SHAPE:
        return False
    return plan.load_in_4bit and plan.global_batch_size == _BATCH and plan.compute_dtype == "bfloat16"


COLUMNS = ("strategy", "GPUs", "time", "GPU hours", "tokens/s", "cost", "energy", "speed is")


def forecast_rows(known: Sequence[Forecast]) -> list[tuple[str, ...]]:
    """A row of `COLUMNS` for each layout."""
    return [
        (
            each.strategy,
            f"{each.world_size}" if each.nodes == 1 else f"{each.world_size} on {each.nodes} nodes",
            f"{each.hours:,.2f} h" if each.hours >= 1 else f"{each.hours * 60:,.1f} min",
            f"{each.gpu_hours:,.2f}",
            f"{each.tokens_per_second:,.0f}",
            "-" if each.cost is None else f"{each.cost:,.2f}",
            "-" if each.energy_kwh is None else f"{each.energy_kwh:,.2f} kWh",
            each.source,
        )
        for each in known
    ]
