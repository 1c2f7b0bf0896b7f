"""What makes a run the same run, beyond its recipe: everything that turns rows into numbers, by content. Torch-free.

Each part has a digest of its own, so that what differs can be named. Versions of libraries are no part: they are
information, in `environment.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError
from launch.inputs.caches import config_file
from launch.inputs.dataset_index import SPLITS, rows_digest
from launch.inputs.file_digests import files_digest
from launch.inputs.model_files import MODEL_FILES, part_files, weight_files
from launch.untrusted_files import printable

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.recipe.schema import Recipe

WEIGHTS_PART = "model.weights"
MODEL_PARTS = (WEIGHTS_PART, *MODEL_FILES)
DATA_PARTS = tuple(f"data.{split}.rows" for split in SPLITS)
TRAIN_ROWS = DATA_PARTS[0]  # the dataset's fingerprint
OWN_TEMPLATE = "data.chat_template.text"
"""A part of runs with a chat template of their own alone."""
PARTS = (*MODEL_PARTS, *DATA_PARTS, OWN_TEMPLATE)
NONE = "none"
"""In the place of a digest: the model has no file of that part."""
_SHOWN = 12  # digits of a digest


@dataclass(frozen=True)
class RunIdentity:
    """The parts that are known, by name, each with its digest."""

    parts: Mapping[str, str]

    def missing(self) -> list[str]:
        """Parts that are not known: an older version recorded fewer."""
        return [part for part in PARTS if part not in self.parts and part != OWN_TEMPLATE]

    def only(self, *parts: str) -> RunIdentity:
        """Keep these parts alone."""
        return RunIdentity({part: digest for part, digest in self.parts.items() if part in parts})


def short(digest: str) -> str:
    """The first digits of a digest, which somebody else may have written."""
    return printable(digest[:_SHOWN])


def what_is(part: str) -> str:
    """Put a part in words: its files, or the rows it stands for. `model.content`: what older versions recorded."""
    if part in DATA_PARTS:
        return f"rows and images of data.{part.split('.')[1]}"
    if part == OWN_TEMPLATE:
        return "the file that data.chat_template names"
    if part == WEIGHTS_PART:
        return "all bytes of the safetensors files"
    return ", ".join(MODEL_FILES.get(part, ("config.json", "a sample of the weights"))[:3])


def find_identity(recipe: Recipe, index: Index) -> RunIdentity:
    """Return the identity of a recipe whose base is on this machine. Reads all weights once, in a cache's lifetime.

    Raises:
        ConfigError: the base is not here, has no safetensors weights, or cannot be read.
    """
    file = config_file(recipe)
    if file is None:
        raise ConfigError(
            f"model.name_or_path: {recipe.model.name_or_path} is not on this machine; run `samestep prepare` first"
        )
    return whole_identity(file.parent, recipe, index)


def whole_identity(base: Path, recipe: Recipe, index: Index) -> RunIdentity:
    """The identity of a recipe whose base lies in a folder. ConfigError: something cannot be read."""
    template = recipe.data.chat_template
    own = {} if template is None else {OWN_TEMPLATE: files_digest([Path(template)])}
    return RunIdentity({**model_identity(base).parts, **data_identity(index).parts, **own})


def model_identity(folder: Path) -> RunIdentity:
    """Identify a model's folder: its weights, and the files that turn text and images into what they see."""
    parts = {WEIGHTS_PART: files_digest(weight_files(folder))}
    for part, files in part_files(folder).items():
        parts[part] = files_digest(files) if files else NONE
    return RunIdentity(parts)


def data_identity(index: Index) -> RunIdentity:
    """Identify prepared data: the rows of every split, with their images."""
    others = {f"data.{split}.rows": rows_digest(index.splits[split]) for split in SPLITS if split != "train"}
    return RunIdentity({TRAIN_ROWS: index.fingerprint, **others})


def recorded_identity(metadata: Mapping[str, Any]) -> RunIdentity:
    """What the metadata of a checkpoint says; of one that an older version wrote, the rows of training alone."""
    recorded, rows = metadata.get("identity"), metadata.get("dataset_fingerprint")
    parts = (
        {str(part): str(digest) for part, digest in recorded.items()} if isinstance(recorded, Mapping) else {}
    )
    return RunIdentity({**parts, TRAIN_ROWS: str(rows)} if rows else parts)
