"""The table of `samestep status`, at any width of the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launch.monitor.status import Status
from launch.units import age
from launch.untrusted_files import printable, printable_lines

_LONGEST_REASON = 1000  # characters; a marker may hold every problem of a recipe

STATUS_COLUMNS = ("run", "state", "step", "samples/s", "loss", "checkpoint", "expected end", "restarts")


_BY_USE = ("expected end", "loss", "checkpoint", "restarts", "samples/s")  # the last is left out first


_STATE_WIDTHS = (12, 40)  # the least that holds "running (job", and in which any reason can be read


_STATE_LINES = 4  # on which a short reason may fold before columns are left out for it


_BORDER = 3  # characters that a table puts beside every column


def row(status: Status, now: float) -> tuple[str, ...]:
    """A row of `STATUS_COLUMNS`."""
    because = printable_lines(status.because)
    because = because if len(because) <= _LONGEST_REASON else f"{because[:_LONGEST_REASON]}..."
    why = f" ({because})" if because else ""
    checkpoint = "-"
    if status.checkpoint_step is not None and status.checkpoint_age is not None:
        checkpoint = f"step {status.checkpoint_step}, {age(status.checkpoint_age)} ago"
    return (
        printable(status.run),
        f"{status.state}{why}",
        f"{status.step:,} of {status.max_steps:,}" if status.max_steps is not None else f"{status.step:,}",
        "-" if status.samples_per_second is None else f"{status.samples_per_second:,.2f}",
        "-" if status.loss is None else f"{status.loss:.4g}",
        checkpoint,
        "-" if status.expected_end is None else f"in {age(status.expected_end - now)}",
        _restarts(status) if status.requeued else "-",
    )


def columns_for(width: int, rows: Sequence[Sequence[str]]) -> list[int]:
    """The `STATUS_COLUMNS` that a table of `width` characters has room for beside whole names and readable reasons.

    The most useful ones that fit; those that say nothing only where all others do. Where there is no room even for
    names and reasons, these fold.
    """
    kept = [STATUS_COLUMNS.index(name) for name in ("run", "state", "step")]
    for column in sorted(map(STATUS_COLUMNS.index, _BY_USE), key=lambda column: _says_nothing(column, rows)):
        if has_room(width, rows, (*kept, column)):
            kept.append(column)
    return sorted(kept)


def width_for(rows: Sequence[Sequence[str]]) -> int:
    """Characters of a table that shows every column that says something."""
    shown = [column for column in range(len(STATUS_COLUMNS)) if not _says_nothing(column, rows)]
    return sum(_needed(column, rows) + _BORDER for column in shown) + 1


def has_room(width: int, rows: Sequence[Sequence[str]], columns: Sequence[int]) -> bool:
    """A table of `width` characters shows these columns with whole names and readable reasons."""
    return sum(_needed(column, rows) + _BORDER for column in columns) + 1 <= width


def missed(rows: Sequence[Sequence[str]], kept: Sequence[int]) -> list[str]:
    """The names of those columns that are not `kept` and would say something."""
    return [
        name
        for column, name in enumerate(STATUS_COLUMNS)
        if column not in kept and not _says_nothing(column, rows)
    ]


def _needed(column: int, rows: Sequence[Sequence[str]]) -> int:
    """Characters of a column; of the state, with its reason on `_STATE_LINES`."""
    natural = max(
        map(len, [STATUS_COLUMNS[column], *(line for row in rows for line in row[column].splitlines())])
    )
    if STATUS_COLUMNS[column] != "state":
        return natural
    least, most = _STATE_WIDTHS
    return min(natural, most, max(least, math.ceil(natural / _STATE_LINES)))


def _says_nothing(column: int, rows: Sequence[Sequence[str]]) -> bool:
    return all(row[column] == "-" for row in rows)


def _restarts(status: Status) -> str:
    dead = f", {status.node_fail} node_fail" if status.node_fail else ""
    return f"{status.preempted} preempted, {status.timed_out} time, {status.crashed} crashed{dead}"
