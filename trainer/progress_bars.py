"""Progress of long work on stderr: bars on a terminal, a plain line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

ReportProgress = Callable[[int, int], None]
"""Told how many are done, of how many."""
BeginProgress = Callable[[str], ReportProgress]
"""Begins the report of a piece of work, by its description."""

LINE_SECONDS = 10.0


class ShortenedText(TextColumn):
    """The description, cut with dots where the terminal is narrow: counts and times are shown whole.

    rich 15 takes room from columns that may wrap before it takes it from others; the text itself stays one line.
    """

    def __init__(self) -> None:
        super().__init__("{task.description}", table_column=Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """As `TextColumn`, on one line."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


@contextmanager
def progress_reports(*, quiet: bool = False) -> Iterator[BeginProgress]:
    """Yield what pieces of work report to: bars, or lines where stderr is no terminal: rich 15 draws nothing there."""
    console = Console(stderr=True)
    if quiet:
        yield lambda description: lambda done, total: None
    elif not console.is_terminal or console.is_dumb_terminal:
        yield _LineReport
    else:
        columns = (ShortenedText(), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bars:
            yield lambda description: _bar(bars, description)


def _bar(bars: Progress, description: str) -> ReportProgress:
    task = bars.add_task(description, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


class _LineReport:
    """A line at once, so that nobody waits before a silent log, one every ten seconds, and one when all is done."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._began = self._said = time.monotonic()
        self._say("begins")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._said >= LINE_SECONDS:
            self._said = now
            self._say(f"{done:,} of {total:,} ({now - self._began:.0f} s)")

    def _say(self, words: str) -> None:
        print(f"{self._description}: {words}", file=sys.stderr, flush=True)
