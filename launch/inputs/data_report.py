"""What of a dataset is not trained and scored as it stands: rows dropped, answers ignored, labels nobody can answer.

`trainer.prepare` finds it and says it on the screen; the run's folder keeps every row of it (`data_report.jsonl`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from launch.atomic_files import atomic_write
from launch.errors import ConfigError
from launch.inputs.dataset_index import SPLITS, index_path
from launch.recipe.contradictions import METRIC_NAMES
from launch.untrusted_files import TABLE, parse_json, plain_size, read_text

if TYPE_CHECKING:
    from launch.recipe.schema import Recipe

DROPPED_ROWS = "dropped_rows.jsonl"
"""In an index: the bad rows that `data.on_bad_row: drop` left out."""

LABEL_TOKENS = "label_tokens"
"""A column of an index: the tokens of the whole first label. Indexes of older versions have it not."""

DATA_REPORT_FILE = "data_report.jsonl"

Kind = Literal["dropped", "answers ignored", "unanswerable"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS: dict[Kind, str] = {
    "dropped": "dropped (data.on_bad_row)",
    "answers ignored": "with further answers, which are ignored: the first label is trained and scored",
    "unanswerable": "with a label that no model can answer: too long for evaluation.max_new_tokens, or never equal to "
    "itself under the metric",
}
SHOWN = 3  # rows of each kind on the screen


@dataclass(frozen=True)
class RowNote:
    """One row of one split, by its number in the source. `file`, `line`: where it begins; empty and 0: not known."""

    split: str
    row: int
    kind: Kind
    reason: str
    file: str = ""
    line: int = 0


def notes_of(recipe: Recipe, index: Path) -> list[RowNote]:
    """List everything that the index in the folder `index` left out or that a run of the recipe cannot score."""
    notes = [RowNote(kind="dropped", **parse_json(line)) for line in _lines(index / DROPPED_ROWS)]
    for split in SPLITS:
        notes += _label_notes(index / f"{split}.parquet", split, recipe)
    return notes


def _lines(file: Path) -> list[str]:
    return read_text(file, TABLE).splitlines() if file.is_file() else []


def _label_notes(file: Path, split: str, recipe: Recipe) -> Iterator[RowNote]:
    """Under relaxed accuracy the first tokens of a label may be enough; other metrics are held to take all of them."""
    import pyarrow.parquet as pq

    plain_size(file)
    table = pq.ParquetFile(file).read()
    names = ("row", "answers", "answer_tokens", "human_or_machine")
    row_numbers, counts, relaxed, kinds = (table.column(name).to_pylist() for name in names)
    whole = table.column(LABEL_TOKENS).to_pylist() if LABEL_TOKENS in table.column_names else relaxed
    is_relaxed = _is_relaxed(recipe, min(kinds, default=-1) >= 0)
    max_new_tokens = recipe.evaluation.max_new_tokens
    for row, answers, needed in zip(row_numbers, counts, relaxed if is_relaxed else whole, strict=True):
        if answers > 1:
            yield RowNote(
                split, row, "answers ignored", f"{answers - 1} of its {answers} answers are ignored"
            )
        if needed == 0:
            yield RowNote(split, row, "unanswerable", "the metric does not take the label for its own answer")
        elif needed > max_new_tokens:
            reason = f"the label takes {needed} tokens, evaluation.max_new_tokens is {max_new_tokens}"
            yield RowNote(split, row, "unanswerable", reason)


def _is_relaxed(recipe: Recipe, has_kinds: bool) -> bool:
    """Whether relaxed accuracy says which answers are right, as `trainer.evaluation.metric_functions.load_metrics`."""
    metrics = recipe.evaluation.metrics
    return has_kinds if metrics == "auto" else metrics[0] == METRIC_NAMES[0]


def summarize_notes(notes: Sequence[RowNote]) -> list[str]:
    """A line for each kind that there is: how many rows, and the first of them."""
    lines = []
    for kind in KINDS:
        if rows := [note for note in notes if note.kind == kind]:
            first = ", ".join(f"{note.split} row {note.row}" for note in rows[:SHOWN])
            more = ", ..." if len(rows) > SHOWN else ""
            count = f"{len(rows):,} row{'s' if len(rows) > 1 else ''}"
            lines.append(f"{count} {WORDS[kind]} ({first}{more})")
    return lines


def write_data_report(notes: Sequence[RowNote], folder: Path) -> Path | None:
    """Write every note as a line of `data_report.jsonl` in `folder`, in one rename; None, and no file, without any."""
    file = folder / DATA_REPORT_FILE
    if not notes:
        file.unlink(missing_ok=True)
        return None
    atomic_write(file, "".join(json.dumps(asdict(note)) + "\n" for note in notes))
    return file


def known_notes(recipe: Recipe) -> list[RowNote] | None:
    """`notes_of` the recipe's index; None where it is gone or damaged, which whoever needs it says."""
    try:
        return notes_of(recipe, index_path(recipe))
    except (ConfigError, FileNotFoundError, ValueError):
        return None


def keep_report(recipe: Recipe, run: Path) -> None:
    """Copy the report into a run's folder, in the place of an older one."""
    if (notes := known_notes(recipe)) is not None:
        write_data_report(notes, run)
