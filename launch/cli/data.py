"""`samestep init` and `samestep data`: from somebody's files to a recipe, and a look at what it reads."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli.options import Overrides, RecipeArgument, example, option
from launch.console import echo
from launch.errors import ConfigError
from launch.option_values import named, place, text, whole

commands = typer.Typer()


@commands.command(
    epilog=example("samestep data my.yaml", "samestep data my.yaml --rows 1 --set data.loss=sequence")
)
def data(
    recipe: RecipeArgument,
    rows: Annotated[int, option("--rows", "N", "Rows to show as the model sees them.", whole, 0, 1000)] = 3,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Show what a run will read: rows, images, tokens, the longest rows, and the first ones with their targets."""
    from launch.recipe.loading import find_recipe, load_recipe
    from launch.subprocesses import call_module

    file = find_recipe(recipe)
    load_recipe(file, overrides)
    flags = [word for override in overrides for word in ("--set", override)]
    call_module("trainer.show_data", [str(file), "--rows", str(rows), *flags])


def _column(option: str, of: str) -> Any:
    """An option that names a column of the table."""
    return typer.Option(
        option,
        metavar="COLUMN",
        parser=text(option),
        show_default="by its name",
        help=f"The column of the {of}.",
    )


def _refuse_file(file: Path) -> None:
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: its folder is not there; make it, or give another name")
    if file.exists():
        raise ConfigError(f"{file}: is there already; give another name, or remove it")


@commands.command(
    epilog=example(
        "samestep init my.yaml --data pictures --model Qwen/Qwen2-VL-2B-Instruct",
        "samestep init my.yaml --data pictures --query question --label answer",
    )
)
def init(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", parser=place("FILE"), help="The recipe to write.", show_default="NAME.yaml"
        ),
    ] = None,
    data: Annotated[
        str | None,
        option("--data", "DATA", "A folder with a table and images, or a hub id.", named, unset="asked"),
    ] = None,
    model: Annotated[
        str | None, option("--model", "MODEL", "A hub id, a folder, or `embedded`.", named, unset="asked")
    ] = None,
    gpus: Annotated[
        int | None, option("--gpus", "N", "GPUs it will run on.", whole, 0, 100_000, unset="asked")
    ] = None,
    image: Annotated[str | None, _column("--image", "images")] = None,
    query: Annotated[str | None, _column("--query", "questions")] = None,
    label: Annotated[str | None, _column("--label", "answers")] = None,
) -> None:
    """Write a recipe with comments for your own data. Asks on a terminal for what no option says."""
    from launch.atomic_files import atomic_write
    from launch.inputs.new_recipe import (
        DEFAULT_MODEL,
        recipe_text,
        refuse_unknown_model,
        run_name_of,
        seen_data,
    )
    from launch.recipe.loading import recipe_from_dict
    from launch.untrusted_files import parse_yaml

    asks = sys.stdin.isatty()
    if data is None and not asks:
        raise ConfigError(
            "--data: missing; give a folder with a table (CSV, JSONL, parquet) and its images, or a hub id"
        )
    if file is not None:
        _refuse_file(file)
    data = data or typer.prompt("data (a folder, or a hub id)")
    model = model or (typer.prompt("model", default=DEFAULT_MODEL) if asks else DEFAULT_MODEL)
    if gpus is None and asks:
        gpus = typer.prompt("GPUs", default=1, type=int)
    refuse_unknown_model(model)
    columns = {"image": image, "query": query, "label": label}
    source = seen_data(data, {role: column for role, column in columns.items() if column is not None})
    file = file or Path(f"{source.name}.yaml")
    _refuse_file(file)
    written = recipe_text(run_name_of(file.stem), model, source, 1 if gpus is None else gpus)
    recipe_from_dict(parse_yaml(written))  # what is written can be run
    atomic_write(file, written)
    processes = f" --gpus-per-node {gpus}" if gpus else ""
    echo(f"{file}: written ({source.description})")
    if source.answers > 1:
        echo(
            f"chats have up to {source.answers} answers, of which data.loss: answer trains the last one alone; "
            "to train all of them set data.loss: all_answers"
        )
    quoted = shlex.quote(str(file))
    echo(f"next:\n  samestep data {quoted}\n  samestep run {quoted}{processes}")
