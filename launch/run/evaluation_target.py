"""What `samestep evaluate` is given: a run, a checkpoint, an adapter, a model or a recipe, by name or path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.checkpoints.adapter_file import ADAPTER_CONFIG, is_whole
from launch.checkpoints.manifest import CHECKPOINT_NAME, MANIFEST, read_manifest
from launch.errors import ConfigError
from launch.hub_names import is_hub_id
from launch.inputs.dataset_index import read_index
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import find_recipe, load_recipe
from launch.recipe.schema import Recipe
from launch.run.changes import changes
from launch.run.damaged_adapter import adapter_damage
from launch.run.directory import RunDirectory, open_run
from launch.run.find import find_run
from launch.run.merged_model import merge_behind
from launch.run.variants import VariantName, parse_variant
from launch.untrusted_files import DOCUMENT, UNREADABLE, printable, read_mapping

MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Target:
    """What answers, and the run's folder that keeps the answers, which may not be there yet.

    `models`: what is asked where nobody says. `recipe`, `overrides`: in place of the run's own recipe. `checkpoint`:
    the step of the run's checkpoint that stands for its adapter. `adapter`: a folder that does. `label`: what tells
    the results from the run's own.
    """

    run: RunDirectory
    models: tuple[str, ...]
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    checkpoint: int | None = None
    adapter: Path | None = None
    label: str = ""

    def flags(self) -> list[str]:
        """The command line of the trainer's side."""
        words = ["--run-dir", str(self.run.path)]
        words += [] if self.recipe is None else ["--recipe", str(self.recipe)]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += [] if self.checkpoint is None else ["--checkpoint", str(self.checkpoint)]
        words += [] if self.adapter is None else ["--adapter", str(self.adapter)]
        return [*words, *(["--label", self.label] if self.label else [])]


def find_target(
    name: str, runs_dir: Path, recipe: str | None = None, overrides: Sequence[str] = ()
) -> Target:
    """What a name or a path stands for: a run first, then a folder, a recipe, a model of the hub.

    `recipe`: names data and base for what lies in no run.

    Raises:
        ConfigError: there is no such thing, or it needs a recipe, or has one already.
        CheckpointError: it is a damaged checkpoint of a run.
    """
    target = _of_a_run(name, runs_dir)
    if target is not None:
        if recipe or overrides:
            raise ConfigError(
                f"{'--recipe' if recipe else '--set'}: {name} belongs to {target.run.path}, whose recipe.yaml is used; "
                "leave it out"
            )
        return target
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _outside_of_runs(name, folder, runs_dir, recipe, overrides)
    try:
        file = find_recipe(name)
    except ConfigError as error:
        if recipe is not None and is_hub_id(name):
            return _outside_of_runs(name, folder, runs_dir, recipe, overrides)
        raise ConfigError(
            f"{name}: no such run ({runs_dir.expanduser() / name}), folder or recipe; give a run, a checkpoint, an "
            f"adapter, a recipe ({str(error).partition('; ')[2]}), or a model with --recipe; see --runs-dir"
        ) from None
    if recipe is not None:
        raise ConfigError(f"--recipe: {name} is a recipe itself; leave --recipe out")
    return _before_a_run(file, runs_dir, overrides)


def _of_a_run(name: str, runs_dir: Path) -> Target | None:
    """A run, or what lies in one; None where there is no run."""
    path = Path(name).expanduser()
    try:
        run = find_run(name, runs_dir)
    except ConfigError:
        run = None
    if run is not None:
        return Target(run, default_models(run))
    parent = RunDirectory(path.parent.absolute())
    if len(path.parts) < 2 or not (parent.recipe_file.is_file() and parent.plan_file.is_file()):
        return None
    named = CHECKPOINT_NAME.fullmatch(path.name)
    if named and not named[2]:
        checkpoint = parent.checkpoint(int(named[1]))
        if not checkpoint.is_dir():
            raise ConfigError(
                f"{checkpoint}: no such checkpoint; `samestep checkpoints {parent.path}` shows those there are"
            )
        read_manifest(checkpoint, verify=True)
        return Target(parent, ("base", "adapter", "shuffled"), checkpoint=int(named[1]))
    of_folder = {
        parent.adapter: ("base", "adapter", "shuffled"),
        parent.best_adapter: ("base", "best"),
        parent.merged: ("base", "merged"),
    }
    models = of_folder.get(path.absolute())
    return Target(parent, models) if models else None


def split_of(target: Target, requested: str | None) -> str:
    """The split that is asked: the requested one, else test, else validation, whichever the recipe has.

    Raises:
        ConfigError: the recipe has no such split.
    """
    data = load_recipe(target.recipe or target.run.recipe_file, target.overrides).data
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    split = requested or next((name for name in ("test", "validation") if named[name] is not None), "test")
    if named[split] is None:
        has = " or ".join(name for name, source in named.items() if source is not None)
        raise ConfigError(f"--split: the recipe has no {split} split (data.{split} is null); choose {has}")
    return split


def default_models(run: RunDirectory) -> tuple[str, ...]:
    """The base, and the run's adapter; of a run that is not done, its newest checkpoint."""
    if (run.adapter / ADAPTER_CONFIG).is_file():
        return ("base", "adapter", "shuffled")
    published = [folder.name for folder in run.checkpoints() if (folder / MANIFEST).is_file()]
    return ("base", *published[-1:])


def asks_one_question(target: Target, split: str, max_samples: int | None) -> bool:
    """Whether a single question is asked of the split, so that `shuffled` has no other image to show with it."""
    index = read_index(load_recipe(target.recipe or target.run.recipe_file, target.overrides))
    if index is None:  # not prepared yet: the evaluation prepares it, and says so itself
        return False
    count = sum(len(rows) for name, rows in index.splits.items() if name == split)
    return min(count, max_samples or count) < 2


def _outside_of_runs(
    name: str, folder: Path, runs_dir: Path, recipe: str | None, overrides: Sequence[str]
) -> Target:
    """An adapter, a checkpoint of any library, or a model, which a recipe gives data and settings."""
    is_model = not folder.is_dir() or (
        (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()
    )
    if recipe is None:
        raise ConfigError(
            f"--recipe: missing ({name} lies in no run, whose recipe would name the data); give the recipe with the "
            "data" + ("" if is_model else " and the base")
        )
    file = find_recipe(recipe)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(name).expanduser().absolute().parts[-2:])).strip(
        "-."
    )
    if is_model:
        overrides = [*overrides, *_model_overrides(name, folder)]
    run = open_run(runs_dir, load_recipe(file, overrides).name)
    return Target(
        run,
        ("base",) if is_model else ("base", "adapter"),
        file.absolute(),
        tuple(overrides),
        adapter=None if is_model else folder.absolute(),
        label=label[-100:],
    )


def _model_overrides(name: str, folder: Path) -> list[str]:
    """A model is asked as it is stored: not quantized, in its own dtype."""
    values = ["quantization.load_in_4bit=false", "model.revision=main"]
    if not folder.is_dir():
        return [*values, f"model.name_or_path={name}"]
    try:
        config = read_mapping(folder / MODEL_CONFIG, DOCUMENT)
    except UNREADABLE as error:
        raise ConfigError(
            f"{folder / MODEL_CONFIG}: cannot be read ({error}); get the model again"
        ) from error
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(
            f"{folder / MODEL_CONFIG}: its weights are {printable(dtype)[:40]}; give a model in bfloat16 or float32"
        )
    computed = f"quantization.bnb_4bit_compute_dtype={dtype}"
    return [*values, f"model.name_or_path={folder.absolute()}", f"model.dtype={dtype}", computed]


def _before_a_run(file: Path, runs_dir: Path, overrides: Sequence[str]) -> Target:
    """A recipe whose run may not have begun; where it has, it must be a run of this recipe."""
    recipe = load_recipe(file, overrides)
    run = open_run(runs_dir, recipe.name)
    if run.recipe_file.is_file():
        _refuse_another_recipe(run, recipe)
        return Target(run, ("base",))
    return Target(run, ("base",), file.absolute(), tuple(overrides))


def _refuse_another_recipe(run: RunDirectory, recipe: Recipe) -> None:
    """ConfigError where what answers or what is asked differs from the run's."""
    before, now = altering_values(load_recipe(run.recipe_file)), altering_values(recipe)
    of_answers = ("model.", "quantization.", "data.")
    if differing := [change for change in changes(before, now) if change.key.startswith(of_answers)]:
        raise ConfigError(
            [
                *map(str, differing),
                f"{run.path}: is a run of another recipe (values that differ: {len(differing)}); evaluate the run, or "
                "give the recipe another name with --set name=NAME",
            ]
        )


def missing_models(
    run: RunDirectory, models: Sequence[str], checkpoint: int | None = None, adapter: Path | None = None
) -> list[str]:
    """A line for every model that is asked and not there, with what to do."""
    problems = []
    names = {parse_variant(model) for model in models}
    weights = {name.weights for name in names}
    if checkpoint is not None or adapter is not None:
        which = f"checkpoint-{checkpoint}" if adapter is None else str(adapter)
        problems += [
            f"--models: {name} is of the run's last adapter, not of {which}; leave it out"
            for name in ("merged", "best")
            if name in weights
        ]
    elif {"adapter", "shuffled"} & weights and not (run.adapter / ADAPTER_CONFIG).is_file():
        problems.append(f"{run.adapter}: no adapter yet; {_instead(run)}")
    elif {"adapter", "shuffled"} & weights and (damage := adapter_damage(run)):
        problems.append(damage)
    problems += [line for name in sorted(names, key=str) if (line := _missing_checkpoint(run, name))]
    if not problems and "best" in weights and not is_whole(run.best_adapter):
        problems.append(f"{run.best_adapter}: no best adapter; a run with checkpoint.keep_best writes it")
    if "merged" in weights and not (run.merged / MODEL_CONFIG).is_file():
        problems.append(f"{run.merged}: no merged model yet; make it with `samestep merge {run.path}`")
    if "merged" in weights and (behind := merge_behind(run, run.merged)):
        problems.append(behind)
    return problems


def _instead(run: RunDirectory) -> str:
    newest = [folder.name for folder in run.checkpoints() if (folder / MANIFEST).is_file()][-1:]
    wait = "`samestep run` writes it when the run is done"
    return f"{wait}, until then ask {newest[0]} (--models base,{newest[0]})" if newest else wait


def _missing_checkpoint(run: RunDirectory, name: VariantName) -> str | None:
    if name.step is None or (run.checkpoint(name.step) / MANIFEST).is_file():
        return None
    there = ", ".join(folder.name for folder in run.checkpoints()) or "none"
    return f"--models: {run.path} has no {name.weights} (there are: {there}); choose one of them"
