"""The prepared index of a dataset: where it lies, whether it is current, how it is read. Torch-free.

`trainer.prepare` writes it once, the plan and every rank read it: token counts of every sample without an
image being decoded again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.errors import ConfigError
from launch.inputs.caches import cache_root, config_file, embedded_version, versions_of
from launch.inputs.file_digests import files_digest
from launch.inputs.model_files import part_files
from launch.recipe.schema import EMBEDDED
from launch.untrusted_files import DOCUMENT, TABLE, UNREADABLE, parse_json, read_bytes, reason_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launch.recipe.schema import Recipe

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
INDEX_VERSION = 4
# What the token counts of any dataset depend on.
COUNTING_PACKAGES = ("pillow", "tokenizers", "transformers")
_COUNTING_PARTS = ("model.processor", "model.chat_template", "model.tokenizer")


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


def row_digest(image: bytes, query: str, label: list[str]) -> bytes:
    """sha256 of a row's content: what `prepare` saw, and what a rank reads later, must be the same."""
    texts = "\0".join([query, *label]).encode()
    return hashlib.sha256(hashlib.sha256(image).digest() + texts).digest()


def split_parts(split: str) -> tuple[str, str]:
    """`train[:10%]` -> (`train`, `[:10%]`); `train` -> (`train`, ``)."""
    name, bracket, rest = split.partition("[")
    return name, bracket + rest


def split_files(folder: Path, split: str) -> list[Path]:
    """List the parquet files of one split in a folder: `<split>.parquet`, `<split>-*.parquet`, also under `data/`."""
    name, _ = split_parts(split)
    for place in (folder, folder / "data"):
        if files := sorted([*place.glob(f"{name}.parquet"), *place.glob(f"{name}-*.parquet")]):
            return files
    return []


def local_dataset(recipe: Recipe) -> Path | None:
    """Return the folder of a local dataset, None for a hub id or the embedded set."""
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


def _processor_facts(recipe: Recipe) -> object:
    """What the token counts depend on of a model that is here; its name, where it has to be fetched first."""
    config = config_file(recipe)
    if config is None:
        return recipe.model.name_or_path
    files = part_files(config.parent)
    return {part: files_digest(files[part]) for part in _COUNTING_PARTS}


def index_key(recipe: Recipe) -> str:
    """sha256 (hex, 20 digits) of everything the index depends on; another key is another index."""
    data: dict[str, Any] = recipe.data.model_dump(mode="json", exclude={"vision_cache"})
    local = local_dataset(recipe)
    if local is not None:
        data["files"] = [files_digest(split_files(local, getattr(recipe.data, split))) for split in SPLITS]
    facts = {
        "version": INDEX_VERSION,
        "embedded": embedded_version()
        if EMBEDDED in (recipe.data.dataset, recipe.model.name_or_path)
        else None,
        "packages": versions_of(COUNTING_PACKAGES),
        "data": data,
        "processor": _processor_facts(recipe),
        "revision": recipe.model.revision,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def index_path(recipe: Recipe) -> Path:
    """Return the folder of the recipe's index, existing or not."""
    return cache_root() / "index" / index_key(recipe)


def read_index(recipe: Recipe) -> Index | None:
    """Read the recipe's index; None when it is missing, stale or damaged (then `samestep prepare` makes it)."""
    try:
        return _read_index(index_path(recipe))
    except (FileNotFoundError, _DamagedIndexError):
        return None


def index_damage(recipe: Recipe) -> str | None:
    """Say why the recipe's index cannot be believed, in a line; None where it is whole, or not made yet."""
    try:
        _read_index(index_path(recipe))
    except FileNotFoundError:
        return None
    except _DamagedIndexError as error:
        return str(error)
    return None


class _DamagedIndexError(Exception):
    """Is there, and is not what was written."""


def _read_index(folder: Path) -> Index:
    """An index that is, to the byte, what its `index.json` says; else FileNotFoundError or _DamagedIndexError."""
    from pyarrow import ArrowException

    try:
        facts = parse_json(read_bytes(folder / "index.json", DOCUMENT))
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise _DamagedIndexError(f"{folder}: cannot be read ({reason_of(error)})") from None
    except ValueError as error:
        raise _DamagedIndexError(f"{folder}: cannot be read ({error})") from None
    try:
        files = {split: _as_written(folder / f"{split}.parquet", facts["files"]) for split in SPLITS}
        splits = {split: _read_split(content) for split, content in files.items()}
        fingerprint = rows_digest(splits["train"])
        if fingerprint != facts["fingerprint"]:
            raise _DamagedIndexError(f"{folder}: its rows are not those of its fingerprint")
        return Index(folder, fingerprint, splits)
    except (OSError, ValueError, LookupError, TypeError, ConfigError, ArrowException) as error:
        raise _DamagedIndexError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from None


def rows_digest(split: Split) -> str:
    """sha256 (hexadecimal) of the content of all rows of a split, in their order."""
    return hashlib.sha256(b"".join(split.digests)).hexdigest()


def _as_written(file: Path, digests: dict[str, str]) -> bytes:
    content = read_bytes(file, 16 * TABLE)
    if hashlib.sha256(content).hexdigest() != digests[file.name]:
        raise _DamagedIndexError(f"{file}: has another content than was written")
    return content


def _read_split(parquet: bytes) -> Split:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Not `read_table` and `to_numpy`: they import pandas, a third of `samestep`'s start.
    table = pq.ParquetFile(pa.BufferReader(parquet)).read()

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
