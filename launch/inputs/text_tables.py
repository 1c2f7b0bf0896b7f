"""Rows in JSONL and CSV files that somebody else wrote: read whole within bounds, parsed one at a time. Torch-free."""

from __future__ import annotations

import codecs
import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.untrusted_files import TABLE, UntrustedFileError, parse_json, plain_size, printable, read_bytes

SUFFIXES = (".jsonl", ".csv")
_LIKELY = (".parquet", *SUFFIXES, ".json", ".tsv", ".xlsx", ".arrow")
_SHOWN = 5
csv.field_size_limit(TABLE)  # of a cell; 128 KiB by default


def likely_tables(folder: Path) -> str:
    """Name the first files of a folder that look like tables, whether they are read or not; empty where none does."""
    try:
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _LIKELY)
    except OSError:
        return ""
    return ", ".join([*map(printable, names[:_SHOWN]), *(["..."] if len(names) > _SHOWN else [])])


class TextTable:
    """The rows of some files of one kind, `.jsonl` or `.csv`, end to end.

    The lines are kept as bytes and parsed when asked for, so that data workers share the memory. Blank lines are no
    rows. Raises as `read_bytes` when it is made, and UntrustedFileError for a CSV file that has no header.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._lines: list[bytes] = []
        self._line_numbers = array("q")
        self._ends: list[tuple[int, Path]] = []
        for file in files:
            content = _content(file)
            lines = (
                _records(file, content) if file.suffix == ".csv" else enumerate(content.splitlines(), start=1)
            )
            for line_number, line in lines:
                if line.strip():
                    self._lines.append(line)
                    self._line_numbers.append(line_number)
            self._ends.append((len(self._lines), file))

    def __len__(self) -> int:
        return len(self._lines)

    def raw(self, number: int) -> dict[str, Any]:
        """A row's values by column. ValueError says in a line why it has none."""
        try:
            values = parse_json(self._lines[number], unique_keys=True)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("line 1, ")) from None  # a row is one line
        if not isinstance(values, dict):
            raise ValueError(f"the row is a {type(values).__name__}, not a mapping of columns to values")
        if reason := values.get(_DAMAGED):
            raise ValueError(str(reason))
        return values

    def folder(self, number: int) -> Path:
        """The folder of a row's file, which its image paths are relative to."""
        return self.place(number)[0].parent

    def place(self, number: int) -> tuple[Path, int]:
        """The file of a row and the line on which it begins there, from 1."""
        file = next(file for end, file in self._ends if number < end)
        return file, self._line_numbers[number]

    @cached_property
    def column_names(self) -> list[str]:
        """The columns of all rows, in their order. UntrustedFileError: there are no rows, or none has columns."""
        if not self._lines:
            raise UntrustedFileError(self._ends[0][1], "has no rows", "write some, or name another split")
        names: dict[str, None] = {}
        begin = 0
        for end, file in self._ends:
            for line in self._lines[begin:end]:
                keys = _keys(line)
                names |= dict.fromkeys(keys)
                if keys and file.suffix == ".csv":
                    break  # every record has its header's columns; lines of JSON need not agree
            begin = end
        names.pop(_DAMAGED, None)
        if not names:
            file, place = self.place(0)
            raise UntrustedFileError(
                file,
                f"has no row that can be read (line {place:,}: {self._problem(0)})",
                "write one JSON object a line",
            )
        return list(names)

    def _problem(self, number: int) -> str:
        try:
            self.raw(number)
        except ValueError as error:
            return str(error)
        return "it is empty"


def _keys(line: bytes) -> Sequence[str]:
    """The keys of a row, whose values `TextTable.raw` judges: 100,000 chats of 440 bytes take 0.8 s."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return ()
    return tuple(values) if isinstance(values, dict) else ()


def _content(file: Path) -> bytes:
    if plain_size(file) > TABLE:
        reason = f"is too large ({plain_size(file):,} bytes, at most {TABLE:,} of one file are read)"
        shards = f"{file.stem}-00000{file.suffix}"
        raise UntrustedFileError(file, reason, f"cut it into {shards} and so on, or write parquet")
    content = read_bytes(file, TABLE)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UntrustedFileError(file, "is UTF-16 text", "save it as UTF-8")
    return content


_DAMAGED = "\0damaged"  # no column of a CSV file: it may hold no NUL


def _records(file: Path, content: bytes) -> Iterator[tuple[int, bytes]]:
    """The records of a CSV file, each with the line on which it begins, as JSON; cells without text are null."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is no UTF-8 text ({error.reason} at byte {error.start:,})"
        raise UntrustedFileError(file, reason, "save it as UTF-8") from None
    lines: list[str] = []  # of the record that is read
    reader = csv.reader(_kept(io.StringIO(text, newline=""), lines), strict=True)
    try:
        header = next(reader, [])
        if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), "")):
            raise UntrustedFileError(
                file, f"separates its columns by {other!r}, not by commas", "save it with commas"
            )
        if len(header) > 1 and not header[0] and all(header[1:]):
            raise UntrustedFileError(
                file,
                "has a first column without a name",
                "name it, or take it out (index=False in pandas' to_csv)",
            )
        if spaced := [name for name in header if name != name.strip()]:
            raise UntrustedFileError(
                file, f"has spaces around the column name {spaced[0]!a}", "take them out"
            )
        if not header or len({*header}) != len(header) or not all(name.strip() for name in header):
            raise UntrustedFileError(
                file,
                f"has no header of distinct column names ({printable(','.join(header))[:100]!r})",
                "write one",
            )
        begin = reader.line_num + 1
        for record in reader:
            line_number, begin = begin, reader.line_num + 1
            raw = "".join(lines)
            lines.clear()
            if not record:
                continue
            values: dict[str, str | None] = dict(zip(header, (cell or None for cell in record), strict=False))
            if len(record) != len(header):
                values[_DAMAGED] = f"the row has {len(record)} cells, the header {len(header)}"
            elif any(cell.startswith(' "') and cell in raw for cell in record):  # in quotes it would differ
                values[_DAMAGED] = (
                    "a cell begins with a space before its quote, which is read as a part of the text"
                )
            yield line_number, json.dumps(values).encode()
    except csv.Error as error:
        raise UntrustedFileError(
            file, f"is no CSV (line {reader.line_num:,}: {error})", "correct it"
        ) from None


def _kept(text: Iterable[str], lines: list[str]) -> Iterator[str]:
    """Pass on lines, and add each to `lines`."""
    for line in text:
        lines.append(line)
        yield line
