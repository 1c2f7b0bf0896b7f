"""What README and docs/ tell a reader to type is what the command line and the Makefile take."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from launch.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<needs>.*?) -->\n)?```console\n(?P<body>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def typed_lines() -> Iterator[tuple[str, str]]:
    """(page, line) of every command in a console block."""
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            for line in block["body"].splitlines():
                if line.strip():
                    yield page.name, line


LINES = list(typed_lines())


def complaint(line: str) -> str | None:
    """Why a line cannot be typed as it stands, None if it can."""
    command, *arguments = shlex.split(line, comments=True)
    if command == "samestep":
        return complaint_of_samestep(arguments)
    if command == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return None if set(arguments) <= targets else f"no such target: {arguments}"
    if command == "accelerate":
        config = ROOT / arguments[arguments.index("--config_file") + 1]
        recipe = ROOT / arguments[-1]
        return None if config.is_file() and recipe.is_file() else f"no such file: {config} or {recipe}"
    if command == "sbatch":
        return None if any((ROOT / word).is_file() for word in arguments) else "no such script"
    return None if command in ("source", "touch", "export", "cd") else f"what is {command}?"


def complaint_of_samestep(arguments: list[str]) -> str | None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    if arguments in (["--version"], ["--help"]):
        return None
    command = group.commands.get(arguments[0])
    if command is None:
        return f"no such command: {arguments[0]}"
    try:
        command.make_context(arguments[0], arguments[1:])
    except Exception as error:  # typer's own, whichever it is: the line cannot be typed
        return f"{type(error).__name__}: {error}"
    return None


def test_pages_have_commands() -> None:
    """The pattern that finds blocks finds them: else the next test would pass with nothing to judge."""
    assert len(LINES) > 30
    assert {"README.md", "quickstart.md", "slurm.md", "resume.md"} <= {page for page, _ in LINES}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_of_the_documentation_can_be_typed(page: str, line: str) -> None:
    assert complaint(line) is None, f"{page}: {line}"


def test_a_wrong_command_would_be_found() -> None:
    assert complaint("samestep train x")
    assert complaint("samestep run x --gpus 2")
    assert complaint("make everything")


def test_readme_fits_on_three_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    generated = {"reference/recipe.md", "reference/commands.md", "reference/rules.md"}
    for target in LINK.findall(page.read_text()):
        assert target in generated or (page.parent / target).exists(), target


def test_troubleshooting_quotes_messages_that_the_code_says() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    texts = "\n".join(
        node.value
        for package in ("launch", "trainer")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert len(headings) >= 25
    assert [heading for heading in headings if heading not in texts] == []


def test_every_test_that_holds_a_fault_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "tests" / "FAULTS.md").read_text()))
    assert len(named) > 80
    defined = {
        (file, node.name)
        for file in {file for file, _ in named}
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {(file, test) for file, test in named if test} <= defined


def test_the_map_of_the_code_names_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = page.partition("## Where is ...")[2].partition("## Rules")[0].strip().splitlines()[2:]
    assert len(rows) >= 20
    named = [path for row in rows for path in re.findall(r"`([\w/.]+\.py)`", row)]
    assert len(named) >= len(rows)
    assert [path for path in named if not (ROOT / path).is_file()] == []
