"""What the commands print: text, never markup, and nothing that moves a terminal."""

import io

from rich.console import Console
from rich.table import Table

from launch.screen import add_row


def test_a_cell_is_text_whatever_it_looks_like() -> None:
    table, out = Table("path", "why"), io.StringIO()
    add_row(table, "runs/[old]/x", "a [/old] b")
    add_row(table, "runs/\x1b[2J", "two\nlines")
    Console(file=out, width=100, force_terminal=True, color_system=None).print(table)
    shown = out.getvalue()
    assert "runs/[old]/x" in shown
    assert "a [/old] b" in shown
    assert "runs/\\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert any("two" in line and "lines" not in line for line in shown.splitlines())
