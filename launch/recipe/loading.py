"""Recipes as YAML: found, read strictly (every problem of a file is reported at once), overridden, written."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launch.errors import ConfigError
from launch.hub_names import EMBEDDED
from launch.recipe.fingerprint import LATER
from launch.recipe.refused_fields import OF_OTHER_TOOLS, REFUSED_LORA_FIELDS, REFUSED_TRAINING_FIELDS
from launch.recipe.schema import Recipe
from launch.recipe.validation_errors import validation_errors
from launch.resources import resource_folder, resource_names
from launch.untrusted_files import parse_yaml, read_yaml, reason_of


def find_recipe(name: str | Path) -> Path:
    """Find a recipe file by path, or a shipped one: `embedded`, `embedded.yaml`, `recipes/embedded.yaml`."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.parent in (Path(), Path("recipes")):
        shipped = resource_folder("recipes") / (path.name if path.suffix else f"{path.name}.yaml")
        if shipped.is_file():
            return shipped
    names = [Path(file).stem for file in resource_names("recipes") if file.endswith(".yaml")]
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {near[0]}? shipped: " if near else "give the path of a YAML file, or one of "
    what = "is a folder, no recipe file" if name and path.is_dir() else "no such recipe file"
    raise ConfigError(f"{name or repr(name)}: {what}; {hint}{', '.join(names)}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key.key=value` overrides (values are YAML). ConfigError: every problem."""
    path = Path(path)
    try:
        values = read_yaml(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({reason_of(error)}); give the path of a recipe file"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: not a recipe (a mapping of sections is needed); see recipes/embedded.yaml"
        )
    _complete_own_copy(values, path)
    problems = list(_apply_overrides(values, overrides))
    _make_local_folders_absolute(values)
    _make_local_files_absolute(values, path.parent)
    try:
        recipe = recipe_from_dict(values)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return recipe


def _complete_own_copy(values: dict[str, Any], path: Path) -> None:
    """A run's own copy was written whole by the version that began it: what it lacks means what that version did."""
    if path.name != "recipe.yaml" or not path.with_name("plan.json").exists():
        return
    for dotted, value in LATER.items():
        section, _, key = dotted.partition(".")
        if isinstance(inner := values.get(section), dict):
            inner.setdefault(key, value)


def _make_local_folders_absolute(values: dict[str, Any]) -> None:
    """A run is resumed from any folder: what names a folder here and now goes on naming it."""
    for section, key in (("model", "name_or_path"), ("data", "dataset")):
        inner = values.get(section)
        name = inner.get(key) if isinstance(inner, dict) else None
        with suppress(OSError, RuntimeError):  # what cannot be a path is the recipe's to refuse
            if (
                isinstance(name, str)
                and name not in ("", EMBEDDED)
                and (folder := Path(name).expanduser()).is_dir()
            ):
                values[section][key] = str(folder.resolve())


def _make_local_files_absolute(values: dict[str, Any], folder: Path) -> None:
    """Files that a recipe names lie beside it, or where the command was given; the run's own copy of the recipe has to
    name them too."""
    data, evaluation = values.get("data"), values.get("evaluation")
    metrics = evaluation.get("metrics") if isinstance(evaluation, dict) else None
    if isinstance(evaluation, dict) and isinstance(metrics, list):
        evaluation["metrics"] = [_absolute_metric(metric, folder) for metric in metrics]
    name = data.get("chat_template") if isinstance(data, dict) else None
    with suppress(OSError, RuntimeError, ValueError):
        if isinstance(data, dict) and isinstance(name, str):
            near = [
                place
                for place in (folder / Path(name).expanduser(), Path(name).expanduser())
                if place.is_file()
            ]
            data["chat_template"] = str(near[0].resolve()) if near else name


def _absolute_metric(metric: Any, folder: Path) -> Any:
    """`scores:close` of a file beside the recipe with the file's whole path; anything else as it is."""
    if not isinstance(metric, str) or ":" not in metric:
        return metric
    name, _, function = metric.rpartition(":")
    file = folder / (name if name.endswith(".py") else f"{name}.py")
    with suppress(OSError, RuntimeError, ValueError):
        return f"{file.resolve()}:{function}" if file.is_file() else metric
    return metric


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Validate plain values. ConfigError lists every problem."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(validation_errors(error, Recipe, _refusals())) from None


def _refusals() -> dict[str, str]:
    return REFUSED_TRAINING_FIELDS | REFUSED_LORA_FIELDS | OF_OTHER_TOOLS


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """Write each override into `values`; yields what cannot be applied."""
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            yield f"--set {override}: not key=value; write for example --set training.learning_rate=1e-4"
            continue
        target: Any = values
        for part in keys[:-1]:
            if not isinstance(target, dict):
                break
            section = target.get(part, {})
            if isinstance(
                section, dict
            ):  # a copy: a YAML anchor may stand for several, of which one is meant
                section = target[part] = dict(section)
            target = section
        if not isinstance(target, dict):
            yield f"--set {override}: {'.'.join(keys[:-1])} is a value, not a section; name a key of a section"
            continue
        try:
            target[keys[-1]] = parse_yaml(text)
        except ValueError:
            target[keys[-1]] = text


class _Dumper(yaml.SafeDumper):
    """Long texts as readable blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def dump_recipe(recipe: Recipe) -> str:
    """Complete YAML text: `load_recipe` of it gives an equal recipe."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
    )
