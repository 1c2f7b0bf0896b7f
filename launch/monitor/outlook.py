"""When a run under way will end: the exact work of the steps that are left, at the speed of its last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.errors import SamestepError
from launch.inputs.dataset_index import read_index
from launch.planning.forecast import forecasts
from launch.planning.plan import Plan
from launch.planning.speeds import CPU, work_of_steps, work_per_second
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory
from launch.untrusted_files import UNREADABLE, read_mapping


@dataclass(frozen=True)
class Outlook:
    """`projected_hours`: of all steps of the plan at the speed of the last ones; `forecast_hours`: as `samestep plan`
    expects them, by an earlier attempt's speed or a tabled one (`source`); None where nothing is known."""

    seconds_left: float
    projected_hours: float
    forecast_hours: float | None
    source: str

    def line(self, name: str) -> str | None:
        """The forecast beside what the run does, in words; None without a forecast."""
        if not self.forecast_hours:
            return None
        apart = self.projected_hours / self.forecast_hours - 1
        return (
            f"{name}: {self.projected_hours:,.2f} h for all steps at the speed of the last ones, "
            f"{abs(apart):.0%} {'more' if apart > 0 else 'less'} than the forecast of {self.forecast_hours:,.2f} h "
            f"({self.source})"
        )


def outlook_of(run: RunDirectory, plan: Plan, steps: Sequence[dict[str, Any]]) -> Outlook | None:
    """The outlook of a run from its newest steps; None where its data is not prepared here, or they are too few."""
    try:
        recipe = load_recipe(run.recipe_file)
        index = read_index(recipe)
        if index is None or index.fingerprint != plan.dataset_fingerprint:
            return None
        reached = int(steps[-1]["step"]) if steps else 0
        seconds = {int(line["step"]): float(line["seconds"]) for line in steps if line["seconds"] > 0}
        speed = work_per_second(recipe, index, plan, seconds)
        if speed is None:
            return None
        left = work_of_steps(recipe, index, plan, reached + 1, plan.max_steps)
        whole = work_of_steps(recipe, index, plan, plan.begin.step + 1, plan.max_steps)
        known = forecasts(recipe, index, plan, _card(run, plan), None, None)
    except (SamestepError, *UNREADABLE, LookupError, ValueError):
        return None
    own = next((each for each in known if _layout_of(each) == _layout_of(plan)), None)
    return Outlook(left / speed, whole / speed / 3600, own.hours if own else None, own.source if own else "")


def _layout_of(it: Any) -> tuple[str, int, int]:
    return it.strategy, it.world_size, it.nodes


def _card(run: RunDirectory, plan: Plan) -> str:
    """The card that the run's newest attempt was on."""
    return CPU if plan.device != "cuda" else str(read_mapping(run.environment_file).get("device", ""))
