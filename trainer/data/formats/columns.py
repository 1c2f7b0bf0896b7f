"""Rows of a question and its answers in columns of their own: ChartQA's, or those that `data.columns` names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.errors import ConfigError
from launch.untrusted_files import printable
from trainer.data.formats.images import ImageFiles
from trainer.data.row_errors import RowError, describe_value
from trainer.data.rows import Row, question_row

CHARTQA = ("image", "query", "label", "human_or_machine")
_IMAGE_COLUMNS = (
    "image",
    "images",
    "file_name",
    "file_names",
)  # the last two are those of an imagefolder's metadata
_SHOWN_COLUMNS = 5


@dataclass(frozen=True)
class Columns:
    """The names of the columns. `image`, `human_or_machine`: None where there is none.

    `needs_image`: a row without one is bad, as in ChartQA. `unused`: the table's other columns.
    """

    image: str | None
    query: str
    label: str
    human_or_machine: str | None
    needs_image: bool = False
    unused: tuple[str, ...] = ()

    def row(self, raw: Mapping[str, object], files: ImageFiles) -> Row:
        """Return the row; RowError says why it is none."""
        images = () if self.image is None else files.read_all(raw.get(self.image))
        if self.needs_image and len(images) != 1:
            raise RowError("the image is missing; each row needs exactly one")
        query = raw.get(self.query)
        if not isinstance(query, str):
            raise RowError(f"{self.query} is {describe_value(query)}, not text")
        if not query.strip():
            raise RowError(f"{self.query} is empty")
        return question_row(images, query, self._label(raw), self._kind(raw))

    def _label(self, raw: Mapping[str, object]) -> list[str]:
        label = raw.get(self.label)
        if isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label):
            label = str(label)
        labels = [label] if isinstance(label, str) else label
        if not isinstance(labels, list) or not all(isinstance(text, str) for text in labels):
            raise RowError(f"{self.label} is {describe_value(label)}, not text or a list of text")
        if not labels or not labels[0].strip():
            raise RowError(f"{self.label} is empty")
        return labels

    def _kind(self, raw: Mapping[str, object]) -> int | None:
        if self.human_or_machine is None:
            return None
        kind = raw.get(self.human_or_machine)
        if kind in ("0", "1"):
            return int(str(kind))
        if isinstance(kind, bool) or not isinstance(kind, int) or kind not in (0, 1):
            raise RowError(f"{self.human_or_machine} is {repr(kind)[:100]}, not 0 or 1")
        return kind

    def __str__(self) -> str:
        named = {"image": self.image, "query": self.query, "label": self.label}
        return (
            ", ".join(f"{role} from {name}" for role, name in named.items() if name)
            + ("" if self.image else ", no images")
            + not_used(self.unused)
        )


def not_used(columns: Sequence[str]) -> str:
    """Say which columns are not read: one of them may hold what somebody thinks is trained."""
    more = ", ..." if len(columns) > _SHOWN_COLUMNS else ""
    return f" (not used: {printable(', '.join(columns[:_SHOWN_COLUMNS]))}{more})" if columns else ""


def chartqa_columns(names: Sequence[str], where: str) -> Columns:
    """Return ChartQA's own columns. ConfigError: some are not there."""
    if missing := [name for name in CHARTQA if name not in names]:
        raise ConfigError(
            f"{where} lacks the columns {', '.join(missing)} (it has {', '.join(names)}); ChartQA's columns are "
            f"{', '.join(CHARTQA)}; for others set data.format: columns and data.columns"
        )
    return Columns(*CHARTQA, needs_image=True)


def named_columns(
    given_names: Mapping[str, str], names: Sequence[str], where: str, is_imagefolder: bool = False
) -> Columns:
    """Return the columns that a recipe names (`data.columns`), those it does not name by their usual names.

    `is_imagefolder`: a column `*_file_name` is one of images (`datasets` 5), not of a text's source, say.

    Raises:
        ConfigError: one is not there.
    """
    image = given_names.get("image") or next((name for name in _IMAGE_COLUMNS if name in names), None)
    if image is None and is_imagefolder:
        image = next((name for name in names if name.endswith(("_file_name", "_file_names"))), None)
    kind = given_names.get("human_or_machine") or (
        "human_or_machine" if "human_or_machine" in names else None
    )
    query, label = given_names.get("query", "query"), given_names.get("label", "label")
    unused = tuple(name for name in names if name not in (image, query, label, kind))
    columns = Columns(image, query, label, kind, unused=unused)
    used = {"image": image, "query": columns.query, "label": columns.label, "human_or_machine": kind}
    problems = [
        f"data.columns.{role}: {where} has no column {name} (it has {', '.join(names)}); name one of them"
        for role, name in used.items()
        if name is not None and name not in names
    ]
    if problems:
        raise ConfigError(problems)
    return columns
