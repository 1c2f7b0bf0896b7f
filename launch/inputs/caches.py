"""Where what several runs share lies: the caches, the embedded set in them, and the base models. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from launch.hub_names import EMBEDDED, is_hub_id

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe

# What the embedded charts and the tiny base come from.
EMBEDDED_SOURCES = (
    "trainer/embedded/charts.py",
    "trainer/embedded/questions.py",
    "trainer/embedded/tables.py",
    "trainer/embedded/tiny_model.py",
    "trainer/embedded/pretrain.py",
    "trainer/embedded/pretrain_data.py",
    "trainer/embedded/pretrain_model.py",
)
EMBEDDED_PACKAGES = ("matplotlib", "plotly", "torch", "transformers")


def cache_root() -> Path:
    """`$SAMESTEP_CACHE`, by default `samestep` beside the Hugging Face cache."""
    if configured := os.environ.get("SAMESTEP_CACHE"):
        return Path(configured).expanduser().resolve()
    return hugging_face_home().parent / "samestep"


def private_cache(name: str) -> Path | None:
    """Make a folder for what is executed, which nobody else can write; None where that cannot be had.

    The cache folder may be shared by a group of users, so the user's id is part of the folder's name.
    """
    try:
        folder = cache_root() / f"{name}-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except (OSError, RuntimeError):  # the latter: of a user without a home
        return None
    is_own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return folder if is_own and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def hugging_face_home() -> Path:
    """`$HF_HOME`, or its default as huggingface_hub has it."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser().resolve()


def embedded_folder() -> Path:
    """Return where `prepare` builds the embedded charts (`data/`) and the tiny base (`model/`)."""
    return cache_root() / f"embedded-{embedded_version()}"


@cache
def embedded_version() -> str:
    """sha256 (hex, 12 digits) of the code and the package versions that the embedded set is made with."""
    root = Path(__file__).resolve().parents[2]
    parts = [(root / source).read_bytes() for source in EMBEDDED_SOURCES]
    parts.append(json.dumps(versions_of(EMBEDDED_PACKAGES)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of installed packages, by name."""
    return {package: version(package) for package in packages}


def base_is_there(recipe: Recipe) -> bool:
    """Look for the base model's folder, without the libraries that load it: what is missing, `prepare` fetches."""
    name = recipe.model.name_or_path
    if name == EMBEDDED:
        return (embedded_folder() / "model" / "config.json").is_file()
    if (Path(name).expanduser() / "config.json").is_file():
        return True
    hub = Path(os.environ.get("HF_HUB_CACHE") or hugging_face_home() / "hub").expanduser()
    return any((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*.safetensors"))


def config_file(recipe: Recipe) -> Path | None:
    """Return where a recipe's base has its config.json: its folder, the embedded one, the hub's cache; or None."""
    name = recipe.model.name_or_path
    folder = embedded_folder() / "model" if name == EMBEDDED else Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if name == EMBEDDED or folder.is_dir() or not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=recipe.model.revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
