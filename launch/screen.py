"""What the commands print."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.typed import as_typed
from launch.untrusted_files import printable, printable_lines

if TYPE_CHECKING:
    from rich.table import Table

    from launch.changes import Change
    from launch.index import Index
    from launch.plan import Plan
    from launch.recipe import Recipe
    from launch.start import Topology


def add_row(table: Table, *cells: str) -> None:
    """Add a row whose cells are text: rich would take `[old]` in a path for markup, and fail for `[/old]`."""
    from rich.text import Text

    table.add_row(*(Text(printable_lines(cell)) for cell in cells))


def show_plan(plan: Plan, to_stderr: bool = False) -> None:
    """Print the plan as one table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from launch.plan import plan_rows

    table = Table(
        "number",
        "value",
        title=Text(printable(f"plan of {plan.name}")),
        title_justify="left",
        show_header=False,
    )
    for name, value in plan_rows(plan):
        add_row(table, name, value)
    Console(highlight=False, stderr=to_stderr).print(table)


def show_memory(recipe: Recipe, index: Index, topology: Topology) -> None:
    """Print what each strategy needs on these GPUs; `reserved` counts what is not PyTorch's as well."""
    from rich.console import Console
    from rich.table import Table

    from launch.plan import Where
    from launch.replan import memory_rows
    from launch.settings import gib

    where = Where(topology.strategy, topology.world_size, topology.device, topology.gpu_memory)
    rows = memory_rows(recipe, index, where)
    if not rows:
        return
    known = f"GPUs of {gib(topology.gpu_memory)}" if topology.gpu_memory else "a GPU"
    table = Table("strategy", "loading", "training", "settings", "fits", title_justify="left")
    table.title = f"memory of {known}, {topology.world_size} process{'es' if topology.world_size > 1 else ''}"
    for row in rows:
        add_row(table, *row)
    Console(highlight=False).print(table)


def say_allowed(changed: Sequence[Change]) -> None:
    from launch.changes import consequences

    for consequence in consequences(changed):
        say(f"allowed: {consequence}")


def say(text: str, to_stderr: bool = False) -> None:
    """Print lines of words; what would move a terminal is made visible in them."""
    emit(printable_lines(as_typed(text)), to_stderr)


def emit(text: str, to_stderr: bool = False) -> None:
    """Print a text as it is: a script, a schema, JSON. When nobody reads any more (`| tee` dies of the same Ctrl-C),
    the exit status still counts."""
    out = sys.stderr if to_stderr else sys.stdout
    try:
        print(text, file=out, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        from launch.children import write_to_nowhere

        write_to_nowhere(out.fileno())
