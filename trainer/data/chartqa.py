"""Rows of ChartQA as chat: one reader for the hub, a local folder of parquet files and the embedded set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from launch.errors import ConfigError
from launch.inputs.caches import cache_root, embedded_folder
from launch.inputs.dataset_index import (
    SplitName,
    local_dataset,
    split_files,
    split_parts,
)
from launch.inputs.file_digests import files_digest
from launch.recipe.schema import EMBEDDED, Recipe
from launch.untrusted_files import TABLE, UNREADABLE, plain_size, read_bytes, reason_of

COLUMNS = ("image", "query", "label", "human_or_machine")


@dataclass(frozen=True)
class Row:
    """One question. `image` holds the encoded file's bytes, undecoded; `label[0]` is the answer that is trained."""

    image: bytes
    query: str
    label: list[str]
    human_or_machine: int


class Rows:
    """The rows of one split, read from disk one at a time, so that no rank holds decoded images."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def raw(self, number: int) -> dict[str, Any]:
        """The row as stored, unvalidated."""
        row: dict[str, Any] = self._table[number]
        return row

    def __getitem__(self, number: int) -> Row:
        row = self.raw(number)
        return Row(image_bytes(row["image"]), row["query"], list(row["label"]), int(row["human_or_machine"]))


def image_bytes(image: dict[str, Any]) -> bytes:
    """The bytes of an undecoded `datasets.Image` value, read from its path when it holds no bytes.

    Raises:
        OSError: there is no such file. UntrustedFileError: it is no plain file, or larger than any image.
    """
    if image["bytes"] is not None:
        return bytes(image["bytes"])
    return read_bytes(image["path"], TABLE)


def open_split(recipe: Recipe, split: SplitName) -> Rows:
    """Open a split of the recipe's dataset.

    Raises:
        ConfigError: the folder lacks the split, the hub cannot be reached, or the columns are not ChartQA's.
    """
    wanted: str = getattr(recipe.data, split)
    local = embedded_folder() / "data" if recipe.data.dataset == EMBEDDED else local_dataset(recipe)
    table = _open_local(local, split, wanted) if local is not None else _open_hub(recipe, split, wanted)
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise ConfigError(
            f"data.dataset: {recipe.data.dataset} split {wanted} lacks the columns {', '.join(missing)} "
            f"(it has {', '.join(table.column_names)}); ChartQA's columns are {', '.join(COLUMNS)}"
        )
    try:
        return Rows(table.cast_column("image", datasets.Image(decode=False)))
    except (ValueError, TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            f"data.dataset: the column image holds {table.features['image'].dtype}, not images "
            "(a struct of bytes and path); write it as `datasets.Image` does"
        ) from error


def _open_local(folder: Path, split: SplitName, wanted: str) -> datasets.Dataset:
    name, part = split_parts(wanted)
    files = split_files(folder, wanted)
    if not files:
        raise ConfigError(
            f"data.{split}: no {name}.parquet or {name}-*.parquet in {folder}; "
            "name a split that the folder holds, or correct data.dataset"
        )
    for file in files:
        try:
            plain_size(file)  # pyarrow would wait for a pipe
        except UNREADABLE as error:
            raise ConfigError(
                f"data.{split}: {file} cannot be read ({reason_of(error)}); copy it again"
            ) from error
    content = files_digest(files)
    return _load(
        lambda: datasets.load_dataset(
            "parquet",
            data_files={name: [str(file) for file in files]},
            split=f"{name}{part}",
            # `datasets` knows its tables by the times of the files, which a rewritten file may have kept.
            cache_dir=str(cache_root() / "datasets" / content),
        ),
        f"data.{split}: {wanted} of {folder}",
    )


def _open_hub(recipe: Recipe, split: SplitName, wanted: str) -> datasets.Dataset:
    return _load(
        lambda: datasets.load_dataset(recipe.data.dataset, revision=recipe.data.revision, split=wanted),
        f"data.{split}: {wanted} of {recipe.data.dataset}",
    )


def _load(load: Callable[[], datasets.Dataset], what: str) -> datasets.Dataset:
    try:
        return load()
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({_first_line(error)}); {OFFLINE_ADVICE}") from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{what}: cannot be read ({_first_line(error)}); correct data.dataset or the split"
        ) from error


OFFLINE_ADVICE = (
    "check this machine's network and HTTPS_PROXY, fill the same HF_HOME on a machine with a network, "
    "or point the recipe at a local folder"
)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def chat(system_message: str, row: Row, *, answer: bool) -> list[dict[str, Any]]:
    """The row as messages for `processor.apply_chat_template`: system, user (image, question) and the answer."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": system_message}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.query}]},
    ]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": row.label[0]}]})
    return messages
