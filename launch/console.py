"""What commands print on the terminal, and what happens when nobody is there to read it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

from rich.console import Console
from rich.table import Table

from launch.invocation import as_typed
from launch.untrusted_files import printable_lines

_NARROWEST = 60
"""Columns of a table at least."""


def echo(text: str, to_stderr: bool = False) -> None:
    """Print lines of words; what would move a terminal is made visible in them."""
    emit(printable_lines(as_typed(text)), to_stderr)


def take_any_terminal() -> None:
    """Let output go on where an encoding lacks a character (PYTHONIOENCODING=ascii), which is then written as its code,
    and where a terminal without a size has made `COLUMNS` 0, for which rich prints nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("COLUMNS", "").isdigit() and not int(os.environ["COLUMNS"]):
        del os.environ["COLUMNS"]


def write_to_nowhere(descriptor: int) -> None:
    """What reads or writes there from now on meets /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def log_stderr(text: str) -> None:
    """Say what nobody may be there to hear: a terminal that is gone, or a print that this one interrupted."""
    with contextlib.suppress(OSError, RuntimeError):
        print(printable_lines(text), file=sys.stderr, flush=True)


def emit(text: str, to_stderr: bool = False) -> None:
    """Print a text as it is: a script, a schema, JSON. When nobody reads any more (`| tee` dies of the same Ctrl-C),
    the exit status still counts."""
    out = sys.stderr if to_stderr else sys.stdout
    try:
        print(text, file=out, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        write_to_nowhere(out.fileno())


class PipeSafeConsole(Console):
    """A rich console that ends well when its reader has gone (`| head`): rich 15 ends the process with status 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich for a BrokenPipeError; the rest of the output goes nowhere."""
        self.quiet = True
        write_to_nowhere(self.file.fileno())


def table_console(to_stderr: bool = False) -> PipeSafeConsole:
    """The console that the commands print their tables on. A narrow terminal breaks their lines: rich would leave
    columns out without a word."""
    console = PipeSafeConsole(highlight=False, stderr=to_stderr)
    console.width = max(console.width, _NARROWEST)
    return console


def add_row(table: Table, *cells: str) -> None:
    """Add a row whose cells are text: rich would take `[old]` in a path for markup, and fail for `[/old]`."""
    from rich.text import Text

    table.add_row(*(Text(printable_lines(cell)) for cell in cells))
