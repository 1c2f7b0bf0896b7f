"""Which format the rows of a data set have: as the recipe says, or as their columns show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from launch.errors import ConfigError
from launch.recipe.schema import DataSection
from trainer.data.formats.columns import CHARTQA, chartqa_columns, named_columns, not_used
from trainer.data.formats.images import ImageFiles
from trainer.data.formats.messages import CHATS, READ, messages_row
from trainer.data.rows import Row


@dataclass(frozen=True)
class Format:
    """A format by name; `row`: makes one row of what a table holds; `description`: why this one, for the log.

    `texts`: the columns of question and answer, as the table calls them; None: they are in messages.
    """

    name: str
    row: Callable[[Mapping[str, Any], ImageFiles], Row]
    description: str
    texts: tuple[str, str] | None = None


def choose_format(
    data: DataSection, names: Sequence[str], where: str, is_imagefolder: bool = False
) -> Format:
    """Return the format of a table with the columns `names`; `where`: the table in words.

    Raises:
        ConfigError: the columns are not those of the recipe's format, or of none.
    """
    name, why = _seen(data, names, where) if data.format == "auto" else (data.format, "data.format")
    if name == "messages":
        if not any(column in names for column in CHATS):
            raise ConfigError(
                f"{where} has no column {' or '.join(CHATS)} (it has {', '.join(names)}); set data.format: columns and "
                "data.columns, or write chats"
            )
        unused = [column for column in names if column not in READ]
        row = partial(messages_row, trains_questions=data.loss == "sequence")
        return Format(name, row, f"messages ({why}){not_used(unused)}")
    columns = (
        chartqa_columns(names, where)
        if name == "chartqa"
        else named_columns(
            {str(role): column for role, column in (data.columns or {}).items()}, names, where, is_imagefolder
        )
    )
    return Format(name, columns.row, f"{name} ({why}): {columns}", (columns.query, columns.label))


def _seen(data: DataSection, names: Sequence[str], where: str) -> tuple[str, str]:
    """(format, what shows it)."""
    if data.columns is not None:
        return "columns", "data.columns is given"
    if chats := next((column for column in CHATS if column in names), None):
        return "messages", f"seen from its column {chats}"
    if all(name in names for name in CHARTQA):
        return "chartqa", "seen from its columns"
    if "query" in names and "label" in names:
        return "columns", "seen from its columns query and label"
    raise ConfigError(
        f"{where} has the columns {', '.join(names) or 'none'}, which are of no known format; name those of question "
        "and answer, for example data.columns: {image: picture, query: question, label: answer}, or write chats in a "
        "column messages"
    )
