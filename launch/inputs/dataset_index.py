"""The prepared index of a dataset: where it lies, whether it is current, how it is read. Torch-free.

`trainer.prepare` writes it once, the plan and every rank read it: token counts of every sample without an
image being decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.errors import ConfigError
from launch.hub_names import EMBEDDED, is_hub_id, tried_folder
from launch.inputs.caches import cache_root, config_file, embedded_version, versions_of
from launch.inputs.file_digests import files_digest
from launch.inputs.model_files import part_files, read_own_template
from launch.recipe.fingerprint import later_values
from launch.recipe.split_names import parse_split
from launch.untrusted_files import DOCUMENT, TABLE, UNREADABLE, parse_json, read_bytes, reason_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launch.recipe.schema import Recipe

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
INDEX_VERSION = 6
IMAGE_TOKENS = "image_tokens"
"""A column of an index only where some sample has not exactly one image."""
# What the token counts of any dataset depend on.
COUNTING_PACKAGES = ("pillow", "tokenizers", "transformers")
_COUNTING_PARTS = ("model.processor", "model.chat_template", "model.tokenizer")


@dataclass(frozen=True)
class Split:
    """Token counts of the samples of one split, in the order of the source.

    Arrays of length n: `rows` (row number in the source split, which may hold bad rows between), `text_tokens`
    (all tokens but the images'), `visual_tokens`, `target_tokens` (tokens the loss counts), `human_or_machine` (-1:
    not known); `digests`: of each row's content, `row_digest`. `image_tokens`: the visual tokens of every image of each
    sample, None: every sample has one image. `prefix_tokens`: how many of its first tokens are those of the prefix that
    a micro-batch computes once for all its samples that begin with it, 0: none; None: of no sample.
    """

    rows: NDArray[np.int64]
    text_tokens: NDArray[np.int64]
    visual_tokens: NDArray[np.int64]
    target_tokens: NDArray[np.int64]
    human_or_machine: NDArray[np.int64]
    digests: tuple[bytes, ...] = ()
    image_tokens: tuple[tuple[int, ...], ...] | None = None
    prefix_tokens: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Text and visual tokens of each sample, [n]."""
        return self.text_tokens + self.visual_tokens

    @property
    def own_tokens(self) -> NDArray[np.int64]:
        """Tokens of each sample besides the shared prefix, [n]."""
        return self.tokens if self.prefix_tokens is None else self.tokens - self.prefix_tokens

    def prefixes(self, samples: Sequence[int]) -> list[int]:
        """The tokens of the shared prefix that each of these samples begins with."""
        return [0 if self.prefix_tokens is None else int(self.prefix_tokens[sample]) for sample in samples]

    def computed_tokens(self, samples: Sequence[int]) -> int:
        """Tokens that a micro-batch of these samples computes: the shared prefix is computed once."""
        return int(self.own_tokens[list(samples)].sum()) + max(self.prefixes(samples), default=0)

    @property
    def visual_squares(self) -> NDArray[np.int64]:
        """The sum of the squares of its images' visual tokens, of each sample, [n]: images do not see each other."""
        import numpy as np

        if self.image_tokens is None:
            return self.visual_tokens**2
        squares = [sum(tokens * tokens for tokens in images) for images in self.image_tokens]
        return np.array(squares, dtype=np.int64)

    def tokens_of_images(self, sample: int) -> tuple[int, ...]:
        """The visual tokens of each image of a sample."""
        if self.image_tokens is None:
            return (int(self.visual_tokens[sample]),)
        return self.image_tokens[sample]


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


def splits_of(recipe: Recipe) -> dict[SplitName, str]:
    """The splits that a recipe has, as it calls them; training always, validation and test where they are not null."""
    named: dict[SplitName, str | None] = {split: getattr(recipe.data, split) for split in SPLITS}
    return {split: name for split, name in named.items() if name is not None}


def split_files(folder: Path, split: str) -> list[Path]:
    """List the files of one split in a folder, of the first kind that is there: `NAME.parquet`, `NAME-*.parquet`, also
    under `data/`; the same with .jsonl and .csv; `NAME/metadata.jsonl`, .csv or .parquet of an imagefolder."""
    name = parse_split(split).name
    for suffix in ("parquet", "jsonl", "csv"):
        for place in (folder, folder / "data"):
            if files := sorted([*place.glob(f"{name}.{suffix}"), *place.glob(f"{name}-*.{suffix}")]):
                return files
    for place in (folder / name, folder / "data" / name):
        for metadata in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
            if (place / metadata).exists():
                return [place / metadata]
    return []


def local_dataset(recipe: Recipe) -> Path | None:
    """Return the folder of a local dataset, None for a hub id or the embedded set."""
    name = recipe.data.dataset
    if name == EMBEDDED:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not os.access(folder, os.R_OK | os.X_OK):  # it would look empty
            raise ConfigError(f"data.dataset: {folder} cannot be read (Permission denied); give permission")
        return folder.resolve()
    if folder.exists():
        raise ConfigError(
            f"data.dataset: {name!r} is no folder; give the folder that it is in, and data.train: {folder.stem}"
        )
    if not is_hub_id(name):
        raise ConfigError(
            f"data.dataset: {name!r} is not a folder here ({tried_folder(name)}) and not a hub id (owner/name); "
            "give a folder of parquet, JSONL or CSV files, a hub id, or `embedded`"
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
    data = {key: value for key, value in data.items() if f"data.{key}" not in later_values(recipe)}
    local = local_dataset(recipe)
    if local is not None:
        data["files"] = [files_digest(split_files(local, name)) for name in splits_of(recipe).values()]
    if recipe.data.chat_template is not None:
        read_own_template(recipe.data.chat_template)  # what cannot be read is said by its key
        data["chat_template"] = files_digest([Path(recipe.data.chat_template)])
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
        index = _read_index(index_path(recipe))
    except (FileNotFoundError, _DamagedIndexError):
        return None
    return index if recipe.batch.prefix_sharing else _without_prefixes(index)


def _without_prefixes(index: Index) -> Index:
    splits = {name: replace(split, prefix_tokens=None) for name, split in index.splits.items()}
    return replace(index, splits=splits)


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
        tuple(map(tuple, table.column(IMAGE_TOKENS).to_pylist()))
        if IMAGE_TOKENS in table.column_names
        else None,
        column("prefix_tokens"),
    )
