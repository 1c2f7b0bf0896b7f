"""A recipe for somebody's own data, with comments: what `samestep init` writes. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.hub_names import EMBEDDED, is_hub_id
from launch.inputs.text_tables import SUFFIXES, TextTable, likely_tables
from launch.option_values import NAME_PATTERN
from launch.recipe.split_names import is_split
from launch.untrusted_files import (
    UNREADABLE,
    UntrustedFileError,
    parse_yaml,
    plain_size,
    printable,
    reason_of,
)

DEFAULT_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
_USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "file_name", "picture", "photo", "img", "file", "path", "image_path"),
    "query": ("query", "question", "prompt", "instruction", "problem"),
    "label": ("label", "answer", "answers", "response", "output", "target", "caption", "solution"),
}
_CHATS = ("messages", "conversations")
_FIRST_ROWS = 1_000  # that are looked at
_SHARD = re.compile(r"-\d+(-of-\d+)?$")
_BATCH = 32
_STEPS_OF_AN_EPOCH = 20  # with fewer, smaller batches teach more
_VALIDATION_NAMES = ("val", "validation", "valid", "dev")


@dataclass(frozen=True)
class SeenData:
    """What is known of a data set: a name for the recipe, its splits (None: has none) and what its columns are.

    `columns`: as `data.columns`, None where they need no names; `description`: in words; `rows`: of the training
    split, None where they are not counted; `answers`: the most of a chat among its first rows, 0 where none is one.
    """

    name: str
    dataset: str
    splits: Mapping[str, str | None]
    columns: Mapping[str, str] | None
    description: str
    rows: int | None = None
    answers: int = 0


def seen_data(dataset: str, named: Mapping[str, str]) -> SeenData:
    """Look at a folder, or take a hub id by its word. `named`: columns that the user names, by their roles.

    Raises:
        ConfigError: the folder holds no table, or its columns need names.
    """
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"--data: {printable(str(folder))} is no folder; give the folder that it is in")
        if dataset != EMBEDDED and not is_hub_id(dataset):
            raise ConfigError(
                f"--data: {dataset!r} is not a folder here and not a hub id (owner/name); give a folder with a table"
            )
        splits: dict[str, str | None] = {"train": "train", "validation": "train, 5 %", "test": None}
        if dataset in (EMBEDDED, "HuggingFaceM4/ChartQA"):
            splits = {"train": "train", "validation": "val", "test": "test"}
        return SeenData(run_name_of(dataset), dataset, splits, named or None, "the hub is not asked")
    tables = _tables(folder)
    if not tables:
        unread = likely_tables(folder)
        raise ConfigError(
            f"--data: {folder} holds no table ({', '.join(SUFFIXES)} or .parquet, or metadata.jsonl beside the "
            f"images){f', but {unread}' if unread else ''}; write one with a line for each question"
        )
    train = "train" if "train" in tables else next(iter(tables))
    validation = next((name for name in _VALIDATION_NAMES if name in tables), None)
    splits = {
        "train": train,
        "validation": validation or f"{train}, 5 %",
        "test": "test" if "test" in tables else None,
    }
    unnamed = [name for name in splits.values() if name is not None and not is_split(name)]
    if unnamed:
        file = printable(tables[train].name if splits["train"] in unnamed else unnamed[0])
        raise ConfigError(
            f"--data: {file} has no name that a split can have; rename it to letters, digits, ., _ and -"
        )
    names, rows, answers = _look_at(tables[train])
    columns = _roles(names, named, tables[train])
    if _SHARD.search(tables[train].stem):
        rows = None  # of the first file alone
    if rows == 1 and validation is None:  # no row can be drawn out of it
        splits["validation"] = None
    counted = "" if rows is None else f"{rows:,} rows, "
    others = [name for name in tables if name not in splits.values()]
    left_out = f"; not used: {', '.join(map(printable, others))}" if others else ""
    no_images = "" if _has_images(names, columns) else "; no column of images was seen, --image names one"
    description = f"{tables[train].name}, {counted}columns {', '.join(names)}{left_out}{no_images}"
    name = run_name_of(folder.resolve().name)
    return SeenData(name, str(folder), splits, columns, description, rows, 0 if columns else answers)


def recipe_text(name: str, model: str, source: SeenData, gpus: int) -> str:
    """The recipe as YAML with comments, for `gpus` GPUs (0: none)."""
    tiny = model == EMBEDDED or gpus == 0
    dtype = "float32" if tiny else "bfloat16"
    few_rows = source.rows is not None and source.rows < _STEPS_OF_AN_EPOCH * _BATCH
    batch = max(8 if few_rows else _BATCH, gpus)
    lines = [
        "# Written by `samestep init`. Every key and its default: `samestep schema`.",
        f"name: {_quoted(name)}  # the run's name",
        "model:",
        f"  name_or_path: {_quoted(model)}  # a hub id, a local folder, or embedded (a tiny one for trying out)",
        f"  dtype: {dtype}",
        "quantization:",
        "  load_in_4bit: true  # QLoRA; false: plain LoRA",
        f"  bnb_4bit_compute_dtype: {dtype}",
        "lora:",
        "  r: 8",
        "  lora_alpha: 16",
        "  target_modules: [q_proj, v_proj]  # or all-linear",
        "data:",
        f"  dataset: {_quoted(source.dataset)}",
        "  format: auto  # chartqa, messages, columns; auto: seen from the columns, and said",
    ]
    if source.columns:
        lines.append(f"  columns: {json.dumps(dict(source.columns), ensure_ascii=False)}")
    is_drawn = ", " in (source.splits["validation"] or "")
    comments = {
        "train": "a table's name, or a slice of it: NAME[:90%]",
        "validation": "drawn out of the training rows, the same in every run; null: none"
        if is_drawn
        else "what the run is evaluated on as it trains; null: none",
        "test": "what `samestep evaluate` asks; null: none",
    }
    for split, comment in comments.items():
        split_name = source.splits[split]
        lines.append(f"  {split}: {'null' if split_name is None else _quoted(split_name)}  # {comment}")
    lines += [
        "  system_message: null  # the first message of every chat; null: none",
        "  loss: answer  # answer: the last answer; all_answers: every answer of a chat; sequence: every token",
        "  max_pixels: null  # a bound of an image's area, for speed; null: the processor's",
        "batch:",
        f"  global_batch_size: {batch}  # samples of a step, the same on any number of GPUs",
        "training:",
        "  num_train_epochs: 3",
        "  learning_rate: 2.0e-4",
        "evaluation:",
        "  every_steps: 10  # validation loss",
        "checkpoint:",
        "  every_steps: 20",
        "tracking:",
        "  report_to: none  # or trackio",
    ]
    return "\n".join(lines) + "\n"


def _has_images(names: Sequence[str], columns: Mapping[str, str] | None) -> bool:
    with_images = ("image", "images", *_CHATS)  # chats may hold them within
    return "image" in columns if columns is not None else any(name in names for name in with_images)


def _tables(folder: Path) -> dict[str, Path]:
    """The tables of a folder by the names of their splits."""
    tables: dict[str, Path] = {}
    for place in (folder, folder / "data"):
        for suffix in (".parquet", *SUFFIXES):
            for file in sorted(place.glob(f"*{suffix}")):
                tables.setdefault(_SHARD.sub("", file.stem), file)
        kinds = ("*/metadata.jsonl", "*/metadata.csv", "*/metadata.parquet")
        for metadata in sorted(file for kind in kinds for file in place.glob(kind)):
            tables.setdefault(metadata.parent.name, metadata)
    return tables


def _look_at(table: Path) -> tuple[list[str], int | None, int]:
    """(columns, rows, most answers of a chat among the first rows)."""
    try:
        if table.suffix in SUFFIXES:
            text = TextTable([table])
            return text.column_names, len(text), max(map(_answers, _first_rows(text)))
        plain_size(table)
        import pyarrow.parquet as pq

        with pq.ParquetFile(table) as parquet:
            names = list(parquet.schema_arrow.names)
            chats = [name for name in _CHATS if name in names]
            batch = next(parquet.iter_batches(_FIRST_ROWS, columns=chats), None) if chats else None
            answers = [_answers(row) for row in batch.to_pylist()] if batch else []
            return names, parquet.metadata.num_rows, max(answers, default=0)
    except UNREADABLE as error:
        if isinstance(error, UntrustedFileError):
            raise ConfigError(f"--data: {error}") from error
        raise ConfigError(f"--data: {printable(str(table))}: {reason_of(error)}; correct it") from error
    except ValueError as error:  # pyarrow's errors are among them
        raise ConfigError(f"--data: {printable(str(table))}: is no table ({error}); correct it") from error


def _first_rows(table: TextTable) -> Iterator[Mapping[str, Any]]:
    for number in range(min(_FIRST_ROWS, len(table))):
        try:
            yield table.raw(number)
        except ValueError:  # `prepare` lists it
            yield {}


def _answers(row: Mapping[str, Any]) -> int:
    """How many messages of a row's chat are answers; 0 where it has none."""
    messages = next((row[name] for name in _CHATS if row.get(name) is not None), None)
    if not isinstance(messages, list):
        return 0
    speakers = [
        message.get("role") or message.get("from") for message in messages if isinstance(message, dict)
    ]
    return sum(speaker in ("assistant", "gpt") for speaker in speakers)


def _roles(names: Sequence[str], named: Mapping[str, str], table: Path) -> dict[str, str] | None:
    if any(name in names for name in _CHATS) and not named:
        return None
    if unknown := [f"--{role} {column}" for role, column in named.items() if column not in names]:
        raise ConfigError(
            f"{', '.join(unknown)}: {table} has no such column (it has {', '.join(names)}); name one of them"
        )
    lower = {name.lower(): name for name in names}
    roles = {
        role: named.get(role) or next((lower[name] for name in usual if name in lower), None)
        for role, usual in _USUAL_NAMES.items()
    }
    if missing := [f"--{role}" for role in ("query", "label") if roles[role] is None]:
        raise ConfigError(
            f"{' and '.join(missing)}: {table} has the columns {', '.join(names)}; say which of them it is"
        )
    if all(roles[role] in (role, None) for role in roles):
        return None
    return {role: column for role, column in roles.items() if column is not None}


def refuse_unknown_model(model: str) -> None:
    """ConfigError where a model is neither a folder here nor named as the hub names models."""
    if model != EMBEDDED and not Path(model).expanduser().is_dir() and not is_hub_id(model):
        raise ConfigError(
            f"--model: {model!r} is not a folder here and not a hub id (owner/name); {DEFAULT_MODEL}, say"
        )


def run_name_of(dataset: str) -> str:
    """A name that a run may have, of the last part of a path or a hub id."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", dataset.rpartition("/")[2]).strip("-._") or "mine"
    return name if re.fullmatch(NAME_PATTERN, name) else "mine"


def _quoted(text: str) -> str:
    """As YAML reads it back: plain where it can be, which `no` and `null` cannot."""
    is_plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9._/-]*", text) and parse_yaml(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
