"""The rows of a split: one reader for the hub, a local folder of parquet, JSONL or CSV files, and the embedded set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from launch.errors import ConfigError
from launch.hub_names import EMBEDDED, tried_folder
from launch.inputs.caches import cache_root, embedded_folder
from launch.inputs.dataset_index import SplitName, local_dataset, split_files, splits_of
from launch.inputs.file_digests import files_digest
from launch.inputs.text_tables import SUFFIXES, TextTable, likely_tables
from launch.recipe.schema import Recipe
from launch.recipe.split_names import parse_split, rows_of_split
from launch.untrusted_files import UNREADABLE, plain_size, printable, reason_of
from trainer.data.formats.choose import Format, choose_format
from trainer.data.formats.images import ImageFiles
from trainer.data.row_errors import RowError
from trainer.data.rows import Row


class Table(Protocol):
    """A source's rows as they are stored."""

    @property
    def column_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def raw(self, number: int) -> dict[str, Any]: ...

    def folder(self, number: int) -> Path | None: ...

    def place(self, number: int) -> tuple[Path, int] | None: ...


class _ArrowTable:
    """A table of `datasets`, its images undecoded. `place`: the folder of its files, None: the hub's."""

    def __init__(self, table: datasets.Dataset, place: Path | None) -> None:
        self._table, self._place = table, place

    @property
    def column_names(self) -> list[str]:
        return list(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def raw(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table[number]
        return row

    def folder(self, number: int) -> Path | None:
        return self._place

    def place(self, number: int) -> None:
        return None


class Rows:
    """The rows of one split, read from disk one at a time, so that no rank holds decoded images.

    `numbers`: the rows of the source that are in the split, by which they are read; `root`: the folder that no image
    path leaves, None: paths are taken as they are.
    """

    def __init__(self, table: Table, kind: Format, numbers: NDArray[np.int64], root: Path | None) -> None:
        self._table, self._root = table, root
        self.kind, self.numbers = kind, numbers
        self._as_written = kind.name == "chartqa" and isinstance(table, _ArrowTable)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def names_files(self) -> bool:
        """Say whether images may lie in files beside the table."""
        return isinstance(self._table, TextTable) or (self._root is not None and self.kind.name != "chartqa")

    def place(self, number: int) -> tuple[str, int] | None:
        """The file that a row of the source is in, below the data set's folder, and its line; None: it has no lines."""
        place = self._table.place(number)
        if place is None:
            return None
        file, line = place
        inside = self._root is not None and file.is_relative_to(self._root)
        return str(file.relative_to(self._root) if inside and self._root else file), line

    def __iter__(self) -> Iterator[Row]:
        return (self[int(number)] for number in self.numbers)

    def __getitem__(self, number: int) -> Row:
        """The row of that number in the source. RowError: it is not of the split's format."""
        try:
            raw = self._table.raw(number)
        except ValueError as error:
            raise RowError(f"the row cannot be read ({error})") from error
        return self.kind.row(raw, ImageFiles(self._table.folder(number), self._root, self._as_written))


def open_split(recipe: Recipe, split: SplitName) -> Rows:
    """Open a split of the recipe's dataset; one that the recipe does not have is empty.

    Raises:
        ConfigError: the folder lacks the split, the hub cannot be reached, or the columns are of no known format.
    """
    splits = splits_of(recipe)
    if split not in splits:
        return Rows(TextTable([]), Format("none", _no_row, ""), np.empty(0, np.int64), None)
    name_and_slice = splits[split]
    local = embedded_folder() / "data" if recipe.data.dataset == EMBEDDED else local_dataset(recipe)
    table = (
        _open_local(local, split, name_and_slice)
        if local is not None
        else _open_hub(recipe, split, name_and_slice)
    )
    files = split_files(local, name_and_slice) if local is not None else []
    kind = choose_format(
        recipe.data,
        table.column_names,
        f"data.dataset: {recipe.data.dataset} split {name_and_slice}",
        is_imagefolder=[file.stem for file in files] == ["metadata"],
    )
    if odd := _odd_files(files, name_and_slice):
        kind = replace(kind, description=f"{kind.description}; of more files: {odd}")
    others = tuple(other for name, other in splits.items() if name != split)
    numbers = rows_of_split(name_and_slice, len(table), others)
    if not len(numbers):
        raise ConfigError(
            f"data.{split}: {name_and_slice} holds none of the {len(table):,} rows of "
            f"{parse_split(name_and_slice).name}; name others"
        )
    return Rows(table, kind, numbers, local)


def _odd_files(files: Sequence[Path], name_and_slice: str) -> str:
    """The files of a split that are neither of its name nor numbered parts of it: `train-old.csv` is read too.

    Parts that the hub's converter wrote end with 16 digits of a digest.
    """
    name = re.escape(parse_split(name_and_slice).name)
    own = re.compile(rf"({name}(-\d+(-of-\d+(-[0-9a-f]{{16}})?)?)?|metadata)", re.ASCII)
    return ", ".join(printable(file.name) for file in files if not own.fullmatch(file.stem))


def _no_row(raw: object, files: ImageFiles) -> Row:
    raise RowError("the split is empty")


def _open_local(folder: Path, split: SplitName, name_and_slice: str) -> Table:
    name = parse_split(name_and_slice).name
    files = split_files(folder, name_and_slice)
    if not files:
        tables = likely_tables(folder)
        there = f" (it has {tables})" if tables else ""
        raise ConfigError(
            f"data.{split}: no {name}.parquet or {name}-*.parquet in {folder}, nor {name}.jsonl, {name}.csv or "
            f"{name}/metadata.jsonl{there}; name a split that the folder holds, or correct data.dataset"
        )
    for file in files:
        try:
            plain_size(file)  # pyarrow would wait for a pipe
        except UNREADABLE as error:
            raise ConfigError(
                f"data.{split}: {file} cannot be read ({reason_of(error)}); copy it again"
            ) from error
    if files[0].suffix in SUFFIXES:
        try:
            return _text_table(tuple(files), files_digest(files))
        except UNREADABLE as error:
            raise ConfigError(f"data.{split}: {error}") from error
    _refuse_without_rows(files)
    content = files_digest(files)
    table = _load(
        lambda: datasets.load_dataset(
            "parquet",
            data_files={name: [str(file) for file in files]},
            split=name,
            # `datasets` knows its tables by the times of the files, which a rewritten file may have kept.
            cache_dir=str(cache_root() / "datasets" / content),
        ),
        f"data.{split}: {name_and_slice} of {folder}",
    )
    return _ArrowTable(_undecoded(table), files[0].parent)


@lru_cache(maxsize=4)
def _text_table(files: tuple[Path, ...], digest: str) -> TextTable:
    """The table of files whose content has this digest. A start opens the same one several times: for the trial, for
    training, for evaluation, and for a split that is drawn out of it."""
    return TextTable(files)


def _refuse_without_rows(files: Sequence[Path]) -> None:
    """ConfigError where parquet files hold no row, which `datasets` says in words about its batches."""
    try:
        rows = sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowException, OSError):
        return  # `datasets` says what is wrong
    if not rows:
        raise ConfigError(f"{files[0]}: has no rows; write some, or name another split")


def _open_hub(recipe: Recipe, split: SplitName, name_and_slice: str) -> Table:
    name = parse_split(name_and_slice).name
    load = partial(datasets.load_dataset, recipe.data.dataset, revision=recipe.data.revision, split=name)
    source = (
        f"{recipe.data.dataset} on the hub (it is not a folder here: {tried_folder(recipe.data.dataset)})"
    )
    return _ArrowTable(_undecoded(_load(load, f"data.{split}: {name_and_slice} of {source}")), None)


def _load(load: Callable[[], datasets.Dataset], what: str) -> datasets.Dataset:
    try:
        return load()
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({_first_line(error)}); {OFFLINE_ADVICE}") from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{what}: cannot be read ({_first_line(error)}); correct data.dataset or the split"
        ) from error


def _undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """With every image as the bytes and the path that are stored, at any depth.

    A column `image` that holds neither is refused here; a text is an image's path.
    """
    features = {name: _undecoded_feature(feature) for name, feature in table.features.items()}
    column = features.get("image")
    if isinstance(column, datasets.Value) and column.dtype not in ("string", "large_string", "binary"):
        raise _no_images(table)
    if features != dict(table.features):
        try:
            return table.cast(datasets.Features(features))
        except (ValueError, TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise _no_images(table) from error
    return table


def _no_images(table: datasets.Dataset) -> ConfigError:
    return ConfigError(
        f"data.dataset: the column image holds {table.features['image'].dtype}, not images "
        "(a struct of bytes and path); write it as `datasets.Image` does"
    )


def _undecoded_feature(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded_feature(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded_feature(feature.feature))
    return feature


OFFLINE_ADVICE = (
    "check this machine's network and HTTPS_PROXY, fill the same HF_HOME on a machine with a network, "
    "or point the recipe at a local folder"
)


def _first_line(error: BaseException) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__  # its own words say nothing
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def sources(rows_by_split: Sequence[tuple[SplitName, Rows]]) -> Iterator[str]:
    """Yield, in a line for each, what the splits' rows were taken for; equal lines once."""
    described: set[str] = set()
    for split, rows in rows_by_split:
        if rows.kind.description and rows.kind.description not in described:
            described.add(rows.kind.description)
            yield f"data.format of {split}: {rows.kind.description}"
