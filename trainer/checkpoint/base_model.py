"""The unquantized base that an adapter is merged into: found, checked, and known to be the one of the training."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError
from launch.index import embedded_folder
from launch.manifest import MANIFEST
from launch.recipe import EMBEDDED, Recipe
from launch.recipe_file import load_recipe
from launch.run_directory import RunDirectory
from trainer.checkpoint.adapter import Adapter
from trainer.checkpoint.reading import Layout, checked, read_json, unreadable_is_refused
from trainer.checkpoint.shards import read_base_shards
from trainer.pretrained import folder_identity

COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")  # all but the weights
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseCheck:
    """Whether a base was held against the training's: `how`, or why it could not be."""

    compared: bool
    how: str

    def __str__(self) -> str:
        return f"base {'' if self.compared else 'not '}compared with the training's: {self.how}"


class _Config(Layout):
    """What is read of config.json."""

    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None


def run_of(source: Path) -> RunDirectory | None:
    """The run directory that `source` is, or lies in; None outside a run."""
    source = source.expanduser().absolute()
    for folder in (source, source.parent):
        if RunDirectory(folder).recipe_file.is_file():
            return RunDirectory(folder)
    return None


def recipe_of(source: Path, recipe_file: Path | None = None) -> Recipe | None:
    """The recipe of the run that `source` belongs to, or `recipe_file`; None without one."""
    if recipe_file is not None:
        return load_recipe(recipe_file)
    run = run_of(source)
    return load_recipe(run.recipe_file) if run else None


@unreadable_is_refused()
def check_base(adapter: Adapter, folder: Path) -> BaseCheck:
    """Hold a base against what the newest checkpoint of the adapter's run says of the training's.

    Raises:
        CheckpointError: it is another.
    """
    identity, where = _trained_on(adapter.path)
    if identity is None:
        return BaseCheck(False, where)
    found = folder_identity(folder)
    kinds = ["commit" if COMMIT.fullmatch(each) else "content" for each in (identity, found)]
    if kinds[0] != kinds[1]:
        return BaseCheck(
            False,
            f"{where} knows its base by its {kinds[0]}, and of the one given the {kinds[1]} alone is known",
        )
    if found != identity:
        raise CheckpointError(
            f"{folder}: is not the base that the run was trained on ({found[:12]} here, {identity[:12]} in "
            f"{where}); give the same revision with --base-model"
        )
    return BaseCheck(True, f"the same {kinds[0]} ({identity[:12]}) as in {where}")


@unreadable_is_refused()
def find_base(adapter: Adapter, base_model: str | None = None) -> Path:
    """The folder of the base model: `base_model`, or what the adapter names; a local folder or a hub id.

    Raises:
        CheckpointError: it cannot be had.
    """
    name = base_model or adapter.base
    if not name:
        raise CheckpointError(
            f"{adapter.path}: its adapter_config.json names no base model; give it with --base-model"
        )
    folder = embedded_folder() / "model" if name == EMBEDDED else Path(name).expanduser()
    if name == EMBEDDED and not folder.is_dir():
        raise CheckpointError(
            f"{name}: the embedded base is not in the cache; run `samestep prepare embedded`"
        )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; give the base model's folder with --base-model")
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"{name}: no such folder; give the base model's folder or hub id with --base-model"
        )
    return _snapshot(name, _revision(name, adapter))


def _trained_on(source: Path) -> tuple[str | None, str]:
    """The `base_identity` of the newest checkpoint beside an adapter, and where it stands; else None and the reason."""
    run = run_of(source)
    if (source / MANIFEST).is_file():
        folders = [source]
    elif run is not None:
        folders = list(reversed(run.checkpoints()))
    else:
        return None, f"{source.name} is no checkpoint of samestep and lies in no run"
    reason = "no checkpoint of the run is left, which would say what its base was"
    for folder in folders:
        where = f"{folder.name}/{MANIFEST}"
        try:
            identity = json.loads((folder / MANIFEST).read_text())["facts"].get("base_identity")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # never published: says nothing
        if identity:
            return str(identity), where
        reason = f"{where} does not say what its base was"
    return None, reason


def _revision(name: str, adapter: Adapter) -> str:
    """The revision that the run was trained on, when its recipe lies beside the adapter; else the adapter's."""
    recipe = recipe_of(adapter.path)
    if recipe is not None and recipe.model.name_or_path == name:
        return recipe.model.revision
    return adapter.revision if adapter.revision and adapter.base == name else "main"


def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", *COPIED]
    try:
        cached = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
        read_base_shards(cached)
        return cached
    except (LocalEntryNotFoundError, CheckpointError):
        pass  # not in the cache, or only a part of it
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: the hub knows no such model; correct --base-model or log in"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name}: the base at revision {revision} is not in the cache and the hub cannot be reached "
            f"({type(error).__name__}); run `samestep prepare RECIPE` once on a machine with a network and "
            "the same HF_HOME, or give a local folder with --base-model"
        ) from error


def refuse_quantized_base(folder: Path) -> None:
    """CheckpointError when a model's weights are stored quantized."""
    quantization = _config(folder).quantization_config
    if quantization:
        kind = quantization.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{folder}: its weights are quantized ({kind}); merging would round the sum again, "
            "give the original bf16 or fp32 model with --base-model"
        )


def ties_embeddings(folder: Path) -> bool:
    """Whether a model's lm_head is its embedding."""
    config = _config(folder)
    return bool(config.tie_word_embeddings or (config.text_config or {}).get("tie_word_embeddings"))


def has_vision(folder: Path) -> bool:
    """Whether a model sees images."""
    return _config(folder).vision_config is not None


def _config(folder: Path) -> _Config:
    file = folder / "config.json"
    return checked(_Config, read_json(file), file)
