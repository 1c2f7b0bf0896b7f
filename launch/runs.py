"""What stands between a request and a run directory: another recipe is refused, the request is written down."""

from __future__ import annotations

import json
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


def refuse_another_dataset(run: RunDirectory, plan: Plan) -> None:
    """ConfigError when the run has steps on other data: the recipe's words are the same, the rows are not."""
    old = _fingerprint_of(run)
    if old is not None and old != plan.dataset_fingerprint and (run.checkpoints() or run.adapter.exists()):
        raise ConfigError(
            f"{run.path}: was begun on other data (fingerprint {old[:12]}, now {plan.dataset_fingerprint[:12]}); "
            "choose another --name, or --fresh to move the old run aside"
        )


def _fingerprint_of(run: RunDirectory) -> str | None:
    """The dataset of an older plan, of whatever version; None without one."""
    try:
        found = json.loads(run.plan_file.read_text(encoding="utf-8")).get("dataset_fingerprint")
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def write_request(run: RunDirectory, recipe: Recipe, plan: Plan) -> None:
    """Write `recipe.yaml` and `plan.json`, each in one rename."""
    run.path.mkdir(parents=True, exist_ok=True)
    _replace(run.recipe_file, dump_recipe(recipe))
    _replace(run.plan_file, plan.to_json())


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
