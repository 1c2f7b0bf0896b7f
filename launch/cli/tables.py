"""What the commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from launch.console import add_row, echo, table_console
from launch.untrusted_files import printable

if TYPE_CHECKING:
    from launch.audit.blame import Blame
    from launch.inputs.dataset_index import Index
    from launch.planning.forecast import Forecast
    from launch.planning.plan import Plan
    from launch.planning.topology import Topology
    from launch.recipe.schema import Recipe
    from launch.run.changes import Change


MEMORY_COLUMNS = ("strategy", "loading", "training", "settings", "fits", "note")


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


def plan_json(
    plan: Plan, recipe: Recipe, index: Index, topology: Topology, expected: Sequence[Forecast]
) -> str:
    """What `samestep plan --json` prints: the plan as in plan.json, each strategy's memory, and the forecasts."""
    from launch.planning.oom_fallback import memory_rows

    rows = memory_rows(recipe, index, topology)
    memory = [dict(zip(MEMORY_COLUMNS, row, strict=True)) for row in rows]
    times = [asdict(each) for each in expected]
    return json.dumps({"plan": json.loads(plan.to_json()), "memory": memory, "forecasts": times}, indent=1)


def show_forecasts(expected: Sequence[Forecast]) -> None:
    """Print the expected time of all steps in every layout of which something is known; nothing for none."""
    from rich.table import Table

    from launch.planning.forecast import COLUMNS, forecast_rows

    if not expected:
        return
    table = Table(
        *COLUMNS,
        title=f"forecast for {printable(expected[0].card)}: {expected[0].tokens:,} tokens in all steps, "
        "without loading, evaluations and saves",
        title_justify="left",
    )
    for row in forecast_rows(expected):
        add_row(table, *row)
    table_console().print(table)


SHOWN_TEXT = 70  # characters of a question or an answer
SHOWN_SAMPLES = 10  # of a step, those with the largest losses


def show_blame(blame: Blame) -> None:
    """Print the samples of a step, ranked, and what changes without those that were left out."""
    from rich.table import Table

    from launch.run.blamed import CHANGED_LATER

    table = Table(
        *("row", "share", "loss a target", "targets", "tokens", "question", "target"),
        title=f"step {blame.step}: what each sample adds to its loss of {blame.loss:.6g}",
        title_justify="left",
    )
    for sample in blame.samples[:SHOWN_SAMPLES]:
        share = f"{sample.share / blame.loss:.1%}" if blame.loss else "-"
        figures = (
            str(sample.row),
            share,
            f"{sample.loss:.4g}",
            str(sample.target_tokens),
            f"{sample.tokens:,}",
        )
        add_row(table, *figures, sample.question[:SHOWN_TEXT], sample.target[:SHOWN_TEXT])
    table_console().print(table)
    if (more := len(blame.samples) - SHOWN_SAMPLES) > 0:
        echo(f"{more:,} samples more stand in the file (--json prints all)")
    recorded = "none" if blame.recorded_loss is None else f"{blame.recorded_loss:.6g}"
    verdict = f"equal within {blame.tolerance:.0e}" if blame.agrees else (
        "NOT the same: the step cannot be recomputed here, see `samestep replay`"
    )  # fmt: skip
    echo(f"computed from {blame.checkpoint}; the run recorded a loss of {recorded}: {verdict}")
    if blame.changed:
        echo(f"{CHANGED_LATER}: {'; '.join(blame.changed)}")
    if blame.without:
        table = Table(
            *("step", "figure", "as recorded", "without", "difference"),
            title=f"from step {blame.step} on without row {', '.join(map(str, blame.without))}",
            title_justify="left",
        )
        for each in blame.steps:
            values = (f"{each.recorded:.6g}", f"{each.without:.6g}", f"{each.without - each.recorded:+.2e}")
            add_row(table, f"{each.step:,}", each.name, *values)
        table_console().print(table)


def show_allowed(changed: Sequence[Change]) -> None:
    """Print what differs from the run that goes on, and what follows from it."""
    from launch.run.changes import consequences

    for consequence in consequences(changed):
        echo(f"allowed: {consequence}")
