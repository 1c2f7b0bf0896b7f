"""Where the base model comes from: a local folder, the hub, or the embedded tiny one; and its processor."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoProcessor, ProcessorMixin

from launch.errors import ConfigError
from launch.hub_names import EMBEDDED, is_hub_id
from launch.inputs.caches import embedded_folder
from launch.inputs.families import Family, family_of
from launch.inputs.model_files import read_own_template
from launch.recipe.schema import Recipe
from launch.untrusted_files import (
    DOCUMENT,
    UNREADABLE,
    printable,
    read_mapping,
    reason_of,
)
from trainer.base_files import refuse_unsafe_base
from trainer.chat_template import refuse_endless_template

TOKENIZER_PROBE = "The 12,345% chart of U.S. adults: what is 3 + 4?"

_PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

# What a model needs of its repository; leaves out weights in other formats.
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
    if not _may_be_of_hub(name):
        raise ConfigError(
            f"model.name_or_path: no config.json in {folder}; give a model folder or a hub id (owner/name), "
            "or run `samestep prepare` for the embedded model"
        )
    return _recipe_snapshot(recipe, local_files_only=True)


def _may_be_of_hub(name: str) -> bool:
    """It has the form of a hub id, and no folder here has that name."""
    return is_hub_id(name) and not Path(name).is_dir()


def base_name(recipe: Recipe) -> str:
    """How an adapter names its base: the hub id, so that it loads on any machine, or the local folder.

    The embedded base has its name alone: every machine builds it in its own cache.
    """
    name = recipe.model.name_or_path
    return base_path(recipe) if name != EMBEDDED and Path(name).expanduser().is_dir() else name


def model_class_of(folder: Path) -> Any:
    """The class of transformers that loads a model which somebody merged or trained.

    Raises:
        ConfigError: a file of the folder is damaged, or it is of no family that is known.
    """
    return getattr(transformers, _checked_family(folder, None).model_class)


def family_at(path: str) -> Family:
    """The family of the model in a folder.

    transformers loads a model of another kind into a family's layers as far as the names agree, with a warning.

    Raises:
        ConfigError: a file of the folder is damaged, or config.json names another architecture.
    """
    return _checked_family(Path(path), "model.name_or_path")


def _checked_family(folder: Path, key: str | None) -> Family:
    refuse_unsafe_base(folder, key)
    try:
        return family_of(_read_json(folder / "config.json"))
    except ValueError as error:
        raise ConfigError(f"{f'{key}: ' if key else ''}{folder} is {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_mapping(file, 4 * DOCUMENT)
    except UNREADABLE as error:
        raise ConfigError(
            f"model.name_or_path: {file} cannot be read ({reason_of(error)}); get the model again"
        ) from error


def fetch_base(recipe: Recipe) -> str:
    """Like `base_path`, but downloads what is missing of a hub model, at the recipe's revision, into the shared cache.

    Raises:
        ConfigError: it cannot be had, lacks weight files, or is of no family that is known.
    """
    name = recipe.model.name_or_path
    try:
        path = base_path(recipe)
    except ConfigError:
        if not _may_be_of_hub(name):
            raise
        path = _recipe_snapshot(recipe, local_files_only=False)
    family_at(path)
    return path


def _recipe_snapshot(recipe: Recipe, *, local_files_only: bool) -> str:
    name, revision = recipe.model.name_or_path, recipe.model.revision
    folder = hub_snapshot(name, revision, _FILES, "model.name_or_path", local_files_only=local_files_only)
    # The cache holds what anybody asked for, the processor alone or the weights alone, and does not know it.
    if missing := _missing_files(folder):
        raise ConfigError(
            f"model.name_or_path: {folder} lacks {', '.join(missing[:3])} ({len(missing)} files); run "
            "`samestep prepare RECIPE` on a machine with a network and the same HF_HOME"
        )
    return str(folder)


def hub_snapshot(
    name: str, revision: str, patterns: Sequence[str], key: str, *, local_files_only: bool
) -> Path:
    """The folder in the cache with those files of a hub model that match `patterns`; downloads what is missing.

    `key`: the recipe's key or the option that names the model. With `local_files_only` nothing is downloaded, and a
    folder without all of them may come back: the cache does not know what is missing.

    Raises:
        ConfigError: the hub knows no such model, it cannot be reached, or there is no room for the files.
    """
    shown = printable(name)[:200]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only
            )
        )
    except HFValidationError as error:
        raise ConfigError(
            f"{key}: {shown} is no folder and no hub id (owner/name); correct the name"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{key}: the hub knows no model {shown}; correct the id or log in") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _PLACE_ERRORS:
            raise ConfigError(
                f"HF_HOME: {shown} cannot be stored in the hub's cache ({error.strerror}); make room, or set HF_HOME "
                "to a folder with some"
            ) from error
        raise ConfigError(
            f"{key}: {shown} at revision {printable(revision)} is not in the cache and the hub cannot be reached "
            f"({type(error).__name__}); check this machine's network and HTTPS_PROXY, run `samestep prepare "
            f"RECIPE` on a machine with a network and the same HF_HOME, or set {key} to a local folder"
        ) from error


def _missing_files(folder: Path) -> list[str]:
    """Files that a model needs and the snapshot does not hold: by its own index of weights, and the processor's."""
    needed = {"config.json", "tokenizer_config.json", "model.safetensors"}
    if (index := folder / "model.safetensors.index.json").is_file():
        needed = needed - {"model.safetensors"} | set(_read_json(index).get("weight_map", {}).values())
    if not (folder / "processor_config.json").is_file():
        needed.add("preprocessor_config.json")  # the older name
    return sorted(file for file in needed if not (folder / file).is_file())


def load_processor(recipe: Recipe) -> ProcessorMixin:
    """The base model's processor (tokenizer, image processor, chat template), with the recipe's pixel bounds.

    The texts are padded on the left, as generation wants them; training packs and does not pad.

    Raises:
        ConfigError: the folder holds no processor of its family, or one that wants code of its own run.
    """
    path = base_path(recipe)
    family = family_at(path)
    try:
        # Not given, transformers 5.23 asks on the terminal whether to run what the folder brings along.
        processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen types over files of another kind
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.name_or_path: no processor can be loaded from {path} "
            f"({printable(words)[:200]}); the folder needs the processor and tokenizer files too, and code "
            "in it is not run"
        ) from error
    if not isinstance(processor, getattr(transformers, family.processor_class)):
        raise ConfigError(
            f"model.name_or_path: the processor in {path} is a {type(processor).__name__}, not a "
            f"{family.processor_class}; get the {family.name} again"
        )
    if recipe.data.chat_template is not None:
        processor.chat_template = read_own_template(recipe.data.chat_template)
        refuse_endless_template(processor, Path(recipe.data.chat_template), "data.chat_template")
    else:
        refuse_endless_template(processor, Path(path))
    tokenizer = processor.tokenizer
    # transformers 5 makes an empty Qwen2 tokenizer where the vocabulary's file is missing, without a word.
    probes = {processor.image_token: 1, TOKENIZER_PROBE: None}
    for text, count in probes.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids) != text or count not in (None, len(ids)):
            raise ConfigError(
                f"model.name_or_path: the tokenizer in {path} turns {text!r} into {len(ids)} tokens that read "
                f"{tokenizer.decode(ids)!r}; its files (tokenizer.json) are missing or another model's"
            )
    processor.image_processor.size = _pixel_bounds(recipe, dict(processor.image_processor.size))
    tokenizer.padding_side = "left"
    return processor


def _pixel_bounds(recipe: Recipe, own: dict[str, Any]) -> dict[str, Any]:
    """The processor's bounds of an image's area in pixels (`shortest_edge`, `longest_edge`) with the recipe's in place.

    Raises:
        ConfigError: the recipe gives one, and it is beyond the processor's other.
    """
    own_bounds = {"shortest_edge": recipe.data.min_pixels, "longest_edge": recipe.data.max_pixels}
    bounds = own | {edge: pixels for edge, pixels in own_bounds.items() if pixels is not None}
    least, most = bounds["shortest_edge"], bounds["longest_edge"]
    if least > most and recipe.data.max_pixels is None:
        raise ConfigError(
            f"data.min_pixels: above the processor's own maximum ({least:,} > {most:,} pixels); lower it, or set "
            "data.max_pixels too"
        )
    if least > most:
        raise ConfigError(
            f"data.max_pixels: below the processor's own minimum ({most:,} < {least:,} pixels); raise it, or set "
            "data.min_pixels too"
        )
    return bounds
