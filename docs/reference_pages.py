"""mkdocs hook: writes the reference pages from the code, so that they cannot disagree with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.core import TyperArgument, TyperGroup, TyperOption

from launch.cli.main import app
from launch.recipe.refused_fields import REFUSED_TRAINING_FIELDS
from launch.recipe.schema import Recipe, Section
from launch.rules.checks import rule_rows


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages before mkdocs judges the navigation and the links."""
    for name, lines in (("recipe", recipe_page()), ("commands", commands_page()), ("rules", rules_page())):
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines) + "\n"))
    return files


def recipe_page() -> Iterator[str]:
    """Every key of a recipe with its default and what to give, from the fields of `launch.recipe.schema.Recipe`."""
    yield "# Recipe\n"
    yield (
        "A recipe is a YAML file that says what is trained. It never names a GPU count. Keys keep the names of "
        "the Hugging Face libraries. Unknown keys are refused, and any key can be overridden with "
        "`--set section.key=value`. `samestep schema` prints the JSON schema for editors.\n"
    )
    yield f"`name`: {Recipe.model_fields['name'].description}.\n"
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            yield f"## {name}\n\n{_sentence(section.__doc__)}\n"
            yield "| key | default | give |\n|---|---|---|"
            for key, inner in section.model_fields.items():
                default = "required" if inner.is_required() else f"`{json.dumps(inner.default)}`"
                yield f"| `{key}` | {default} | {_cell(inner.description)} |"
            yield ""
    yield "## Fields of SFTConfig that are refused\n"
    yield "| field | why |\n|---|---|"
    for key, reason in sorted(REFUSED_TRAINING_FIELDS.items()):
        yield f"| `{key}` | {_cell(reason)} |"


def rules_page() -> Iterator[str]:
    """What is refused before anything starts; the same as `samestep rules`."""
    yield "# Rules\n"
    yield "These combinations are refused before anything starts. `samestep rules` prints the same list.\n"
    yield "| rule | why |\n|---|---|"
    for name, reason in rule_rows():
        yield f"| {_cell(name)} | {_cell(reason)} |"


def commands_page() -> Iterator[str]:
    """Arguments and options of every command, from the command line itself."""
    group = typer.main.get_command(app)
    if not isinstance(group, TyperGroup):
        raise TypeError(f"the command line is a {type(group).__name__}, not a group of commands")
    yield "# Commands\n"
    for name, command in group.commands.items():
        yield f"## samestep {name}\n\n{_sentence(command.help)}\n"
        arguments = " ".join(_usage(item) for item in command.params if isinstance(item, TyperArgument))
        yield f"```text\nsamestep {name} [OPTIONS] {arguments}".rstrip() + "\n```\n"
        yield "| argument or option | meaning |\n|---|---|"
        for item in command.params:
            if isinstance(item, TyperArgument):
                yield f"| `{_usage(item)}` | {_cell(item.help)} |"
            elif isinstance(item, TyperOption) and not item.hidden:
                names = ", ".join(f"`{option}`" for option in (*item.opts, *item.secondary_opts))
                yield f"| {names} | {_cell(item.help)} |"
        yield ""


def _usage(argument: TyperArgument) -> str:
    name = (argument.metavar or argument.name or "").upper()
    return name if argument.required else f"[{name}]"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: Any) -> str:
    return _sentence(str(text or "")).replace("|", "\\|")
