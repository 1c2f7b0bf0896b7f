"""The image files that a row names or holds."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from launch.untrusted_files import (
    TABLE,
    UNREADABLE,
    UntrustedFileError,
    path_inside,
    printable,
    read_bytes,
    reason_of,
)
from trainer.data.row_errors import RowError, describe_error, describe_value

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_KEYS = ("bytes", "path", "image", "url")


@dataclass(frozen=True)
class ImageFiles:
    """Reads the images of one row.

    `folder`: what relative paths are relative to; `root`: the data set's folder, which no path leaves; None: the rows
    come from the hub, whose paths are those that `datasets` wrote. `as_written`: the paths in a parquet file are
    taken as they are, which ChartQA's rows always were.
    """

    folder: Path | None = None
    root: Path | None = None
    as_written: bool = False

    def read(self, value: object) -> bytes:
        """Return the bytes of the file that `value` holds or names: bytes, a path, or a mapping with either.

        Raises:
            RowError: there are none, it is an address, or a path that cannot be read or leads outside.
        """
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return self._of_path(value)
        if isinstance(value, Mapping):
            return self._of_mapping(value)
        raise RowError(f"an image is {describe_value(value)}, not bytes or a path")

    def read_all(self, value: object) -> tuple[bytes, ...]:
        """Read the images of a list, a single image, or none for None, an empty path and the empty list."""
        if value is None or value == "":
            return ()
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return tuple(self.read(each) for each in value)
        return (self.read(value),)

    def _of_mapping(self, value: Mapping[str, object]) -> bytes:
        present = {key: value[key] for key in _KEYS if value.get(key) is not None}
        content = present.get("bytes")
        if isinstance(content, bytes):
            return content
        path = present.get("path") or present.get("image") or present.get("url")
        if isinstance(path, Mapping) and path is not value and ("bytes" in path or "path" in path):
            return self._of_mapping(path)
        if isinstance(path, bytes):
            return path
        if not isinstance(path, str) or not path:
            raise RowError("the image is missing: neither bytes nor a path")
        if "path" in present and self.root is None:
            return _read(Path(path), path)  # where `datasets` put the file
        return self._of_path(path)

    def _of_path(self, path: str) -> bytes:
        if not path or "\0" in path:
            raise RowError(f"the path of an image is {path!r}, which names no file; give one")
        if _ADDRESS.match(path):
            kind = "data of its own" if path.startswith("data:") else "an address"
            raise RowError(
                f"the image {printable(path)[:80]!r} is {kind}, and nothing is fetched or unpacked from text; save it "
                "as a file in the data set's folder and give its path"
            )
        if self.as_written:
            return _read(Path(path), path)
        if self.root is None or self.folder is None:
            raise RowError(
                f"the image {printable(path)[:80]!r} is a path, which rows of the hub cannot have; use a column of "
                "images, or a local folder"
            )
        try:
            place = path_inside(self.root, self.folder / Path(path))
        except UntrustedFileError:
            raise RowError(
                f"the image {printable(path)[:200]!r} lies outside of the data set's folder "
                f"{printable(str(self.root))}; copy it into the folder and give a path relative to the file"
            ) from None
        return _read(place, path)


def _read(place: Path, path: str) -> bytes:
    try:
        return read_bytes(place, TABLE)
    except Exception as error:  # whatever the disk or the gate says: it is the row's fault, and one of many
        why = reason_of(error) if isinstance(error, UNREADABLE) else describe_error(error)
        name = printable(str(Path(path) if Path(path).is_absolute() else place.absolute()))[:200]
        raise RowError(
            f"the image file {name} cannot be read ({why}){_hint(place, error)}; give the bytes, or the path of a file "
            "that every machine can read"
        ) from error


def _hint(place: Path, error: Exception) -> str:
    """The name that is there where a file's name is written in other letters: composed otherwise, or in other case."""
    if not isinstance(error, FileNotFoundError):
        return ""
    if similar := _names_in(place.parent).get(_plain(place.name)):
        return f"; there is {printable(ascii(similar))}"
    return ""


@lru_cache(maxsize=64)
def _names_in(folder: Path) -> Mapping[str, str]:
    try:
        return {_plain(file.name): file.name for file in folder.iterdir()}
    except OSError:
        return {}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
