"""What `prepare` writes of the rows it has measured: the index that plans are made of, and the list of bad rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from launch.atomic_files import atomic_dir
from launch.errors import ConfigError
from launch.inputs.data_report import DROPPED_ROWS, LABEL_TOKENS
from launch.inputs.dataset_index import IMAGE_TOKENS, Index, SplitName, index_path, read_index
from launch.recipe.schema import Recipe
from launch.untrusted_files import printable
from trainer.data.lengths import BadRow, Measured

SHOWN_REASONS = 50
SHOWN_ROWS = 5
"""Of each reason."""


def bad_rows_file(recipe: Recipe) -> Path:
    """Return the file that lists all bad rows of a refused dataset: beside the index that was not made."""
    return index_path(recipe).with_name(f"{index_path(recipe).name}.bad_rows.jsonl")


def bad_rows_message(bad: Sequence[BadRow], list_file: Path) -> str:
    """Say how many rows are bad, the first reasons each with its first rows, and where all of them are."""
    of_reason: dict[tuple[str, str, str], list[BadRow]] = {}
    for row in bad:
        of_reason.setdefault((row.split, row.file, row.reason), []).append(row)
    shown = [f"{_rows(rows)}: {rows[0].reason}" for rows in list(of_reason.values())[:SHOWN_REASONS]]
    more = sum(map(len, list(of_reason.values())[SHOWN_REASONS:]))
    rest = [f"... and {more:,} more, of {len(of_reason) - SHOWN_REASONS:,} other reasons"] if more else []
    counted = "1 bad row; mend it" if len(bad) == 1 else f"{len(bad):,} bad rows; mend them"
    head = f"data.dataset: {counted}, or set data.on_bad_row: drop to train without {'it' if len(bad) == 1 else 'them'}"
    return "\n".join([head, *shown, *rest, f"all of them are listed in {list_file}"])


def _rows(rows: Sequence[BadRow]) -> str:
    """`train row 7 (labels.csv line 9)`, or the first of several."""
    more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
    several = "s" if len(rows) > 1 else ""
    numbers = ", ".join(str(row.row) for row in rows[:SHOWN_ROWS])
    lines = ", ".join(str(row.line) for row in rows[:SHOWN_ROWS])
    place = f" ({printable(rows[0].file)} line{several} {lines})" if rows[0].file else ""
    return f"{rows[0].split} row{several} {numbers}{more}{place}"


def json_lines(bad: Sequence[BadRow]) -> str:
    """Return a line of JSON for each bad row."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in bad)


def publish_index(recipe: Recipe, measured: dict[SplitName, list[Measured]], bad: Sequence[BadRow]) -> Index:
    """Write the index aside and move it into place whole, in the place of a damaged one.

    Raises:
        ConfigError: the data changed meanwhile.
    """
    facts = {
        "fingerprint": sha256(b"".join(row.digest for row in measured["train"])).hexdigest(),
        "rows": {split: len(rows) for split, rows in measured.items()},
        "dropped": len(bad),
        "versions": {name: version(name) for name in ("transformers", "datasets", "pillow")},
    }
    with atomic_dir(index_path(recipe)) as aside:
        for split, rows in measured.items():
            pq.write_table(_table(rows), aside / f"{split}.parquet")
        if bad:
            (aside / DROPPED_ROWS).write_text(json_lines(bad), encoding="utf-8")
        digests = {file.name: sha256(file.read_bytes()).hexdigest() for file in aside.glob("*.parquet")}
        (aside / "index.json").write_text(json.dumps({**facts, "files": digests}, indent=1))
        if index_path(recipe).exists():
            shutil.rmtree(index_path(recipe))
    index = read_index(recipe)
    if index is None:
        raise ConfigError(
            f"data.dataset: {recipe.data.dataset} changed while it was being prepared; prepare it again"
        )
    return index


def _table(rows: Sequence[Measured]) -> pa.Table:
    """One line for each row. Of a split whose rows have one image each, as older versions wrote it."""
    one_image = all(len(row.image_tokens) == 1 for row in rows)
    numbers = {
        "row": [row.row for row in rows],
        "text_tokens": [row.text_tokens for row in rows],
        "visual_tokens": [row.visual_tokens for row in rows],
        "target_tokens": [row.target_tokens for row in rows],
        "human_or_machine": [-1 if row.human_or_machine is None else row.human_or_machine for row in rows],
        "answers": [row.answers for row in rows],
        "answer_tokens": [row.answer_tokens for row in rows],
        LABEL_TOKENS: [row.label_tokens for row in rows],
        "prefix_tokens": [row.prefix_tokens for row in rows],
    }
    columns = {name: pa.array(values, pa.int64()) for name, values in numbers.items()}
    columns["digest"] = pa.array([row.digest for row in rows], pa.binary(32))
    if not one_image:
        columns[IMAGE_TOKENS] = pa.array([list(row.image_tokens) for row in rows], pa.list_(pa.int64()))
    return pa.table(columns)
