"""The prepared index of a dataset: where it lies, whether it is current, how it is read. Torch-free.

`trainer.prepare` writes it once, the plan and every rank read it: token counts of every sample without an
image being decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.errors import ConfigError
from launch.recipe import EMBEDDED
from launch.untrusted_files import plain_size, read_mapping

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launch.recipe import Recipe

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
INDEX_VERSION = 1
# What the embedded charts and the tiny base come from, and what the token counts of any dataset depend on.
EMBEDDED_SOURCES = (
    "trainer/data/charts.py",
    "trainer/data/embedded.py",
    "trainer/data/tables.py",
    "trainer/model/tiny.py",
    "trainer/model/tiny_base.py",
    "trainer/model/tiny_lessons.py",
    "trainer/model/tiny_student.py",
)
EMBEDDED_PACKAGES = ("matplotlib", "plotly", "torch", "transformers")
COUNTING_PACKAGES = ("pillow", "tokenizers", "transformers")


@dataclass(frozen=True)
class Split:
    """Token counts of the samples of one split, in the order of the source.

    Arrays of length n: `rows` (row number in the source split, which may hold bad rows between), `text_tokens`
    (all tokens but the image's), `visual_tokens`, `target_tokens` (tokens the loss counts), `human_or_machine`;
    `digests`: of each row's content, `row_digest`.
    """

    rows: NDArray[np.int64]
    text_tokens: NDArray[np.int64]
    visual_tokens: NDArray[np.int64]
    target_tokens: NDArray[np.int64]
    human_or_machine: NDArray[np.int64]
    digests: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Text and visual tokens of each sample, [n]."""
        return self.text_tokens + self.visual_tokens


@dataclass(frozen=True)
class Index:
    """A prepared dataset. `fingerprint` is the sha256 of the content of the training split."""

    path: Path
    fingerprint: str
    splits: dict[SplitName, Split]


def cache_root() -> Path:
    """`$SAMESTEP_CACHE`, by default `samestep` beside the Hugging Face cache."""
    if chosen := os.environ.get("SAMESTEP_CACHE"):
        return Path(chosen).expanduser().resolve()
    return hugging_face_home().parent / "samestep"


def hugging_face_home() -> Path:
    """`$HF_HOME`, or its default as huggingface_hub has it."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser().resolve()


def embedded_folder() -> Path:
    """Where `prepare` builds the embedded charts (`data/`) and the tiny base (`model/`)."""
    return cache_root() / f"embedded-{embedded_version()}"


@cache
def embedded_version() -> str:
    """sha256 (hex, 12 digits) of the code and the package versions that the embedded set is made with."""
    root = Path(__file__).resolve().parents[1]
    parts = [(root / source).read_bytes() for source in EMBEDDED_SOURCES]
    parts.append(json.dumps(_versions(EMBEDDED_PACKAGES)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: version(package) for package in packages}


def row_digest(image: bytes, query: str, label: list[str]) -> bytes:
    """sha256 of a row's content: what `prepare` saw, and what a rank reads later, must be the same."""
    texts = "\0".join([query, *label]).encode()
    return hashlib.sha256(hashlib.sha256(image).digest() + texts).digest()


def split_parts(split: str) -> tuple[str, str]:
    """`train[:10%]` -> (`train`, `[:10%]`); `train` -> (`train`, ``)."""
    name, bracket, rest = split.partition("[")
    return name, bracket + rest


def split_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of one split in a folder: `<split>.parquet`, `<split>-*.parquet`, also under `data/`."""
    name, _ = split_parts(split)
    for place in (folder, folder / "data"):
        if files := sorted([*place.glob(f"{name}.parquet"), *place.glob(f"{name}-*.parquet")]):
            return files
    return []


def local_dataset(recipe: Recipe) -> Path | None:
    """The folder of a local dataset, None for a hub id or the embedded set."""
    name = recipe.data.dataset
    if name == EMBEDDED:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"data.dataset: {name!r} is not a folder here and not a hub id (owner/name); "
            "give a folder of parquet files, a hub id, or `embedded`"
        )
    return None


def _file_facts(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _processor_facts(name_or_path: str) -> object:
    """What the token counts of a local model depend on; a hub model is identified by its revision."""
    folder = Path(name_or_path).expanduser()
    if name_or_path == EMBEDDED or not folder.is_dir():
        return name_or_path
    return _file_facts(sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.txt")]))


def index_key(recipe: Recipe) -> str:
    """sha256 (hex, 20 digits) of everything the index depends on; another key is another index."""
    data: dict[str, Any] = recipe.data.model_dump(mode="json", exclude={"vision_cache"})
    local = local_dataset(recipe)
    if local is not None:
        data["files"] = [_file_facts(split_files(local, getattr(recipe.data, split))) for split in SPLITS]
    facts = {
        "version": INDEX_VERSION,
        "embedded": embedded_version()
        if EMBEDDED in (recipe.data.dataset, recipe.model.name_or_path)
        else None,
        "packages": _versions(COUNTING_PACKAGES),
        "data": data,
        "processor": _processor_facts(recipe.model.name_or_path),
        "revision": recipe.model.revision,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def index_path(recipe: Recipe) -> Path:
    """The folder of the recipe's index, existing or not."""
    return cache_root() / "index" / index_key(recipe)


def read_index(recipe: Recipe) -> Index | None:
    """The recipe's index; None when it is missing, stale or damaged (then `samestep prepare` makes it)."""
    from pyarrow import ArrowException

    folder = index_path(recipe)
    try:
        facts = read_mapping(folder / "index.json")
        splits = {split: _read_split(folder / f"{split}.parquet") for split in SPLITS}
        return Index(folder, facts["fingerprint"], splits)
    except (FileNotFoundError, ValueError, KeyError, TypeError, ArrowException):
        return None


def base_is_there(recipe: Recipe) -> bool:
    """A look for the base model's folder, without the libraries that load it: what is missing, `prepare` fetches."""
    name = recipe.model.name_or_path
    if name == EMBEDDED:
        return (embedded_folder() / "model" / "config.json").is_file()
    if (Path(name).expanduser() / "config.json").is_file():
        return True
    hub = Path(os.environ.get("HF_HUB_CACHE") or hugging_face_home() / "hub").expanduser()
    return any((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*.safetensors"))


def _read_split(file: Path) -> Split:
    import numpy as np
    import pyarrow.parquet as pq

    # Not `read_table` and `to_numpy`: they import pandas, a third of `samestep`'s start.
    plain_size(file)
    table = pq.ParquetFile(file).read()

    def column(name: str) -> NDArray[np.int64]:
        return np.array(table.column(name).to_pylist(), dtype=np.int64)

    return Split(
        column("row"),
        column("text_tokens"),
        column("visual_tokens"),
        column("target_tokens"),
        column("human_or_machine"),
        tuple(table.column("digest").to_pylist()),
    )
