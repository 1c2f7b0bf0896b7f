"""Where the base model comes from: a local folder, the hub, or the embedded tiny one; and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoProcessor, Qwen2VLProcessor

from launch.errors import ConfigError
from launch.index import EMBEDDED, embedded_folder
from launch.recipe import Recipe

# What a Qwen2-VL needs of its repository; leaves out weights in other formats.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]


def base_path(recipe: Recipe) -> str:
    """The folder that holds the base model: the recipe's own, the embedded one, or the hub's snapshot in the cache.

    Raises:
        ConfigError: the folder is not there, or the snapshot is not in the cache (run `samestep prepare`).
    """
    name = recipe.model.name_or_path
    folder = embedded_folder() / "model" if name == EMBEDDED else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if name == EMBEDDED or folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"model.name_or_path: no config.json in {folder}; give a model folder or a hub id (owner/name), "
            "or run `samestep prepare` for the embedded model"
        )
    return _snapshot(recipe, local_files_only=True)


def base_name(recipe: Recipe) -> str:
    """How an adapter names its base: the hub id, so that it loads on any machine, or the local folder."""
    name = recipe.model.name_or_path
    return base_path(recipe) if name == EMBEDDED or Path(name).expanduser().is_dir() else name


def fetch_base(recipe: Recipe) -> str:
    """Like `base_path`, but downloads a hub model at the recipe's revision into the shared cache when it is missing."""
    try:
        return base_path(recipe)
    except ConfigError:
        if recipe.model.name_or_path == EMBEDDED or recipe.model.name_or_path.count("/") != 1:
            raise
    return _snapshot(recipe, local_files_only=False)


def _snapshot(recipe: Recipe, *, local_files_only: bool) -> str:
    name, revision = recipe.model.name_or_path, recipe.model.revision
    try:
        return snapshot_download(
            name, revision=revision, allow_patterns=_FILES, local_files_only=local_files_only
        )
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model.name_or_path: the hub knows no model {name}; correct the id or log in"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"model.name_or_path: {name} at revision {revision} is not in the cache and the hub cannot be reached "
            f"({type(error).__name__}); run `samestep prepare RECIPE` once on a machine with a network and the same "
            "HF_HOME, or set model.name_or_path to a local folder"
        ) from error


def load_processor(recipe: Recipe) -> Qwen2VLProcessor:
    """The base model's processor (tokenizer, image processor, chat template), with the recipe's pixel bounds.

    The texts are padded on the left, as generation wants them; training packs and does not pad.
    """
    processor = cast(Qwen2VLProcessor, AutoProcessor.from_pretrained(base_path(recipe)))
    size = dict(processor.image_processor.size)
    if recipe.data.min_pixels is not None:
        size["shortest_edge"] = recipe.data.min_pixels
    if recipe.data.max_pixels is not None:
        size["longest_edge"] = recipe.data.max_pixels
    processor.image_processor.size = size
    processor.tokenizer.padding_side = "left"
    return processor
