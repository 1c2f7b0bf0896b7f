"""What the commands print: text, never markup, and nothing that moves a terminal."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from launch.console import add_row, echo, emit, table_console


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


def test_no_table_of_the_launcher_is_filled_past_that() -> None:
    rows = {
        file.name: len(re.findall(r"\.add_row\(", file.read_text(encoding="utf-8")))
        for file in Path("launch").rglob("*.py")
    }
    assert {name: count for name, count in rows.items() if count} == {"console.py": 1}


def test_words_are_made_visible_and_texts_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    echo("a\x1b[2J\tb\u202e\nc")
    echo("a\udcffb", to_stderr=True)  # a file's name of other bytes
    said = capsys.readouterr()
    assert said.out == "a\\x1b[2J\\tb\\u202e\nc\n"
    assert said.err == "a\\udcffb\n"
    emit("#!/bin/bash\n\techo")
    assert capsys.readouterr().out == "#!/bin/bash\n\techo\n"


def test_a_narrow_terminal_loses_no_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    console = table_console()
    table = Table(*(f"column{number}" for number in range(5)))
    table.add_row(*"abcde")
    console.print(table)
    assert set("abcde") <= set(capsys.readouterr().out.splitlines()[3])
