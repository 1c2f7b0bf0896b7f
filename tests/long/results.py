"""The table of what the long tests showed: RESULTS.md beside this file, a section for each test that passed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.launching import ROOT

RESULTS = Path(__file__).with_name("RESULTS.md")
_HEAD = """# What `make test-long` showed

Real launches over gloo, a tiny Qwen2-VL with random weights, dropout 0.05, learning rate 2e-4. Losses: largest relative
difference; adapters: largest absolute difference. Each section is written by its test when it passes.
"""


def record(heading: str, rows: Sequence[tuple[str, str]]) -> None:
    """Write the section of a test that passed, in the place of its older one; the others stay."""
    sections = read_sections(RESULTS.read_text()) if RESULTS.exists() else {}
    table = [f"| {what} | {found} |" for what, found in rows]
    sections[heading] = "\n".join([stamp(), "", "| what | found |", "|---|---|", *table])
    write_sections(sections)


def read_sections(text: str) -> dict[str, str]:
    """Heading -> what stands below it."""
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)[1:]
    return {heading: body.strip() for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def write_sections(sections: dict[str, str]) -> None:
    """The whole file, sections in the order of their headings."""
    body = [f"\n## {heading}\n\n{section}\n" for heading, section in sorted(sections.items())]
    RESULTS.write_text("".join([_HEAD, *body]))


def write_table(file: Path, head: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A file with one table: what it is, when and where it was measured, the rows."""
    lines = [" | ".join(columns), "|".join("---" for _ in columns), *(" | ".join(row) for row in rows)]
    file.write_text(f"{head}\n{stamp()}\n\n" + "".join(f"| {line} |\n" for line in lines))


def commit() -> str:
    """What is tried: the commit, and whether anything but such tables differs from it."""
    found = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git(
        "status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}", ":!tests/faults/RESULTS.md"
    )
    return f"{found} with changes" if changed else found


def stamp() -> str:
    """When, of what and where a table was measured."""
    cores = len(os.sched_getaffinity(0))
    return (
        f"{date.today().isoformat()}, commit {commit()}, {cores} cores, torch {version('torch')} on the CPU."
    )


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()
