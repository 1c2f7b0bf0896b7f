"""Speeds that earlier attempts of a recipe reached on a card, remembered in the cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.atomic_files import atomic_write
from launch.inputs.caches import cache_root
from launch.planning.rechecks import COST, rechecked_share
from launch.planning.run_steps import stream_of, work_of_samples
from launch.untrusted_files import UNREADABLE, parse_json, read_text

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.planning.plan import Plan
    from launch.recipe.schema import Recipe

WARM_UP = 3
"""First steps of an attempt that say little: kernels are compiled, the allocator grows, data workers fill."""
LEAST = 3
"""Steps after these from which a speed is taken."""
_KEPT = 200
CPU = "CPU"
"""The name of the card where there is none."""


@dataclass(frozen=True)
class Speed:
    """What an attempt reached. `work_per_second`: in the unit of `step_plan.cost`, of all processes together.

    `recipe`: `speed_key`; `steps`: how many were measured.
    """

    recipe: str
    card: str
    strategy: str
    world_size: int
    nodes: int
    work_per_second: float
    steps: int


def speed_key(recipe: Recipe) -> str:
    """sha256 (hex, 16 digits) of the values of a recipe that its speed depends on, besides the tokens of its steps."""
    values = recipe.model_dump(mode="json")
    parts = [values["model"], values["quantization"], values["lora"], values["batch"]]
    names = ("gradient_checkpointing", "deterministic", "dataloader_num_workers")
    parts += [values["training"][name] for name in names]
    parts += [values["data"]["loss"], values["data"]["vision_cache"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def work_of_steps(recipe: Recipe, index: Index, plan: Plan, first: int, last: int) -> float:
    """The work of the steps `first` to `last`, counted from 1, over all processes."""
    return sum(work_by_step(recipe, index, plan, range(first, last + 1)).values())


def work_by_step(recipe: Recipe, index: Index, plan: Plan, steps: Iterable[int]) -> dict[int, float]:
    """The work of each of these steps, counted from 1, over all processes, with what is computed a second time."""
    stream, work = stream_of(recipe, plan), work_of_samples(index.splits["train"])
    return {
        step: float(work[stream.samples(step - 1)].sum())
        * (1 + COST * rechecked_share(recipe, plan, step - 1))
        for step in steps
    }


def work_per_second(recipe: Recipe, index: Index, plan: Plan, seconds: Mapping[int, float]) -> float | None:
    """The speed of measured steps (step, counted from 1 -> its seconds); None for too few.

    The median over steps, each held against its work: a step beside something else that the machine did says nothing,
    and the vision tower of a step may be computed in the one before. Steps that `training.recheck` had computed twice
    are left out where enough others are there, so that the speed serves for every share of rechecks.
    """
    steps = [step for step in seconds if step > plan.begin.step]
    plain = [step for step in steps if not rechecked_share(recipe, plan, step - 1)]
    work = work_by_step(recipe, index, plan, plain if len(plain) >= LEAST else steps)
    slowness = {step: seconds[step] / work[step] for step in work if work[step] > 0 and seconds[step] > 0}
    if len(slowness) < LEAST:
        return None
    return 1 / statistics.median(slowness.values())


def speeds_file() -> Path:
    """Where speeds are remembered."""
    return cache_root() / "speeds.json"


def read_speeds() -> list[Speed]:
    """Every remembered speed, the newest last; none where the file cannot be read."""
    try:
        entries = parse_json(read_text(speeds_file()))
        return [speed for entry in entries if (speed := _parse(entry))]
    except (*UNREADABLE, TypeError, ValueError):
        return []


def _parse(entry: Any) -> Speed | None:
    try:
        speed = Speed(
            recipe=str(entry["recipe"]),
            card=str(entry["card"]),
            strategy=str(entry["strategy"]),
            world_size=int(entry["world_size"]),
            nodes=int(entry["nodes"]),
            work_per_second=float(entry["work_per_second"]),
            steps=int(entry["steps"]),
        )
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    return speed if 0 < speed.work_per_second < math.inf and speed.world_size > 0 else None


def remember_speed(recipe: Recipe, index: Index, plan: Plan, card: str, seconds: Mapping[int, float]) -> None:
    """Keep the speed of an attempt's steps, `seconds` by step; its first ones are left out. OSError: no room."""
    measured = dict(sorted(seconds.items())[WARM_UP:])
    if (speed := work_per_second(recipe, index, plan, measured)) is None:
        return
    new = Speed(speed_key(recipe), card, plan.strategy, plan.world_size, plan.nodes, speed, len(measured))
    others = [each for each in read_speeds() if _layout(each) != _layout(new)]
    file = speeds_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = [*others, new][-_KEPT:]
    atomic_write(file, json.dumps([asdict(each) for each in kept], indent=1) + "\n")


def _layout(speed: Speed) -> tuple[str, str, str, int, int]:
    return speed.recipe, speed.card, speed.strategy, speed.world_size, speed.nodes
