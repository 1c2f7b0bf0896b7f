"""What stands between a request and a run directory: another recipe is refused, the request is written down."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import ConfigError
from launch.recipe import Recipe, altering_values, dump_recipe, load_recipe
from launch.run_directory import RunDirectory

if TYPE_CHECKING:
    from launch.plan import Plan


def refuse_another_recipe(run: RunDirectory, recipe: Recipe) -> None:
    """ConfigError when the run was begun with a recipe that trains something else; names every differing value."""
    if not run.recipe_file.is_file():
        return
    old, new = altering_values(load_recipe(run.recipe_file)), altering_values(recipe)
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        raise ConfigError(
            [
                *(
                    f"{key}: the run {run.name} has {old.get(key)!r}, the recipe {new.get(key)!r}"
                    for key in differing
                ),
                f"{run.path}: belongs to another recipe ({len(differing)} values differ); "
                "choose another --name, or --fresh to move the old run aside",
            ]
        )


def write_request(run: RunDirectory, recipe: Recipe, plan: Plan) -> None:
    """Write `recipe.yaml` and `plan.json`, each in one rename."""
    run.path.mkdir(parents=True, exist_ok=True)
    _replace(run.recipe_file, dump_recipe(recipe))
    _replace(run.plan_file, plan.to_json())


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
