"""What no single field of a recipe can see: values that contradict each other, and names that cannot exist.

Every function yields its problems, `<key>: <what is wrong> (<values>); <what to do>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

from launch.errors import ConfigError
from launch.hub_names import EMBEDDED, tried_folder
from launch.option_values import place
from launch.recipe.schedules import wrong_schedule
from launch.recipe.split_names import FORMS as SPLIT_FORMS
from launch.recipe.split_names import parse_split
from launch.untrusted_files import printable

if TYPE_CHECKING:
    from launch.recipe.schema import DataSection, Recipe

METRIC_NAMES = ("relaxed_accuracy", "exact_match", "anls", "token_f1")
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./+@-]{0,254}"  # of git's names for a branch, those that the hub takes


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Every problem of values that are each allowed for themselves."""
    data, training = recipe.data, recipe.training
    yield from _wrong_splits(data)
    yield from _wrong_metrics(recipe.evaluation.metrics)
    if data.validation is None and (recipe.evaluation.answers or recipe.evaluation.early_stop):
        yield "evaluation.answers: there is no validation split to ask (data.validation: null); name one"
    if data.columns is not None and data.format not in ("auto", "columns"):
        yield f"data.columns: is for data.format: columns, not {data.format}; drop one of the two"
    if data.columns is not None:
        columns = [*data.columns.values()]
        if twice := next((column for column in columns if columns.count(column) > 1), None):
            yield f"data.columns: {twice!r} is named for two of image, query and label; name different columns"
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        yield f"data.min_pixels: above max_pixels ({data.min_pixels} > {data.max_pixels}); swap or drop one"
    if training.max_steps == 0:
        yield "training.max_steps: 0 steps train nothing; give at least 1, or -1 for num_train_epochs"
    if training.warmup_steps >= 1 and not training.warmup_steps.is_integer():
        yield (
            f"training.warmup_steps: not a whole number of steps ({training.warmup_steps}); "
            "give a whole number, or a share of the steps below 1"
        )
    if training.lr_scheduler_type == "constant" and training.warmup_steps:
        yield (
            f"training.warmup_steps: `constant` would ignore the warm-up ({training.warmup_steps}); "
            "use lr_scheduler_type: constant_with_warmup, or warmup_steps: 0"
        )
    yield from wrong_schedule(
        training.lr_scheduler_type, training.lr_scheduler_kwargs, training.learning_rate
    )
    if recipe.checkpoint.keep_best == "accuracy" and not recipe.evaluation.answers:
        yield (
            "checkpoint.keep_best: accuracy is not measured during training (evaluation.answers: 0); set "
            "evaluation.answers, or keep_best: eval_loss"
        )
    yield from _wrong_names(recipe)
    if recipe.hub.push and not recipe.hub.repo_id:
        yield "hub.repo_id: missing while hub.push is true; give owner/name, or set hub.push: false"


def _wrong_splits(data: DataSection) -> Iterator[str]:
    for key in ("train", "validation", "test"):
        split = getattr(data, key)
        try:
            drawn = split is not None and parse_split(split).share > 0
        except ValueError as error:
            yield f"data.{key}: {split!r} {error}; write {SPLIT_FORMS}"
            continue
        if drawn and key == "train":
            yield f"data.train: {split!r} draws rows to be left out of training; write it as data.validation"
    if data.validation is not None and data.validation == data.test and "," in data.validation:
        yield "data.test: draws the same rows as data.validation; name another split, or null"


def _wrong_metrics(names: list[str] | str) -> Iterator[str]:
    short = [PurePath(name).name.replace(".py:", ":") for name in names] if names != "auto" else []
    if twice := next((name for name in short if short.count(name) > 1), None):
        yield f"evaluation.metrics: {twice!r} is named {short.count(twice)} times; name each metric once"
    for name in () if names == "auto" else names:
        module, colon, function = name.rpartition(":")
        if name not in METRIC_NAMES and not (colon and module and function.isidentifier()):
            yield (
                f"evaluation.metrics: {name!r} is not {', '.join(METRIC_NAMES)} or module:function; write for example "
                "scores:close for the function close in scores.py beside the recipe"
            )


def _wrong_names(recipe: Recipe) -> Iterator[str]:
    """What no folder and nothing on the hub can be called."""
    for key, name in (
        ("model.name_or_path", recipe.model.name_or_path),
        ("data.dataset", recipe.data.dataset),
    ):
        if name == EMBEDDED:
            continue
        try:
            path = place(key)(name)
        except ConfigError as error:
            yield str(error)
            continue
        is_path = name.startswith((".", "/", "~")) or path.is_dir()
        if not is_path and (wrong := _not_of_the_hub(name)):
            yield (
                f"{key}: {name!a} is not a folder here ({printable(tried_folder(name))}) and not a hub id (owner/name: "
                f"{wrong}); correct the name"
            )
    for key, id_ in (("hub.repo_id", recipe.hub.repo_id), ("tracking.space_id", recipe.tracking.space_id)):
        if id_ is not None and (wrong := _not_of_the_hub(id_)):
            yield f"{key}: {id_!a} is not a hub id (owner/name: {wrong}); correct the name"
    for key, revision in (("model.revision", recipe.model.revision), ("data.revision", recipe.data.revision)):
        if not re.fullmatch(_REVISION, revision, re.ASCII) or ".." in revision or "//" in revision:
            yield f"{key}: {revision!a} can be no branch, tag or commit; give one, such as main"
    project = recipe.tracking.project
    if not project.isprintable() or not project.strip() or len(project) > 200:
        yield f"tracking.project: {project[:60]!a} cannot be a name ({len(project)} characters); give at most 200"


def _not_of_the_hub(name: str) -> str | None:
    """The hub's own rule, which huggingface_hub applies before any request; None: it can be an id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # has no __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return "1 to 96 of letters, digits, -, _ and . each, no -- or .., not .git at the end"
    return None
