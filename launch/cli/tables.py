"""What the commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from launch.console import add_row, echo, table_console
from launch.untrusted_files import printable

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.planning.forecast import Forecast
    from launch.planning.plan import Plan
    from launch.planning.topology import Topology
    from launch.recipe.schema import Recipe
    from launch.run.changes import Change


MEMORY_COLUMNS = ("strategy", "loading", "training", "settings", "fits")


def show_plan(plan: Plan, to_stderr: bool = False) -> None:
    """Print the plan as one table."""
    from rich.table import Table
    from rich.text import Text

    from launch.planning.plan_table import plan_rows

    table = Table(
        "number",
        "value",
        title=Text(printable(f"plan of {plan.name}")),
        title_justify="left",
        show_header=False,
    )
    for name, value in plan_rows(plan):
        add_row(table, name, value)
    table_console(to_stderr).print(table)


def show_memory(recipe: Recipe, index: Index, topology: Topology) -> None:
    """Print what each strategy needs on these GPUs; `reserved` counts what is not PyTorch's as well."""
    from rich.table import Table

    from launch.planning.oom_fallback import memory_rows
    from launch.units import gib

    rows = memory_rows(recipe, index, topology)
    if not rows:
        return
    known = f"GPUs of {gib(topology.gpu_memory)}" if topology.gpu_memory else "a GPU"
    table = Table(*MEMORY_COLUMNS, title_justify="left")
    table.title = f"memory of {known}, {topology.world_size} process{'es' if topology.world_size > 1 else ''}"
    for row in rows:
        add_row(table, *row)
    table_console().print(table)


def plan_json(plan: Plan, recipe: Recipe, index: Index, topology: Topology, forecast: Forecast | None) -> str:
    """What `samestep plan --json` prints: the plan as in plan.json, each strategy's memory, and the forecast."""
    from launch.planning.oom_fallback import memory_rows

    rows = memory_rows(recipe, index, topology)
    memory = [dict(zip(MEMORY_COLUMNS, row, strict=True)) for row in rows]
    times = asdict(forecast) if forecast else None
    return json.dumps({"plan": json.loads(plan.to_json()), "memory": memory, "forecast": times}, indent=1)


def show_allowed(changed: Sequence[Change]) -> None:
    """Print what differs from the run that goes on, and what follows from it."""
    from launch.run.changes import consequences

    for consequence in consequences(changed):
        echo(f"allowed: {consequence}")
