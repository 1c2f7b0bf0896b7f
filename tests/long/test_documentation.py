"""The commands of README and docs/, run in the order in which a reader meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import BLOCK, ROOT

pytestmark = pytest.mark.long

ORDER = (
    "quickstart.md",
    "evaluation.md",
    "merging.md",
    "audit.md",
    "report.md",
    "resume.md",
    "shipping.md",
    "README.md",
)
"""Later pages go on with the run that the quickstart has made."""

LINKED = (
    "Makefile",
    "README.md",
    "recipes",
    "accelerate_configs",
    "slurm",
    "pyproject.toml",
    "constraints.txt",
    "docs",
)


def blocks(page: str) -> list[str]:
    """The console blocks of a page that need neither a GPU nor a cluster."""
    file = ROOT / "README.md" if page == "README.md" else ROOT / "docs" / page
    return [block["body"] for block in BLOCK.finditer(file.read_text()) if not block["needs"]]


def test_every_page_with_commands_for_this_machine_is_in_the_order() -> None:
    pages = {file.name for file in (ROOT / "docs").glob("*.md") if blocks(file.name)}
    assert pages <= set(ORDER)


def test_the_commands_of_the_documentation_do_what_they_say(tmp_path: Path) -> None:
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    environment = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for page in ORDER:
        for body in blocks(page):
            done = subprocess.run(
                ["bash", "-e", "-c", body],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=1200,
            )
            assert done.returncode == 0, f"{page}\n{body}\n{done.stdout[-4000:]}"
