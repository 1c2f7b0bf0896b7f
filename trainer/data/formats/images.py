"""The image files that a row names or holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.untrusted_files import TABLE, UntrustedFileError, path_inside, printable, read_bytes
from trainer.data.row_errors import RowError, describe_error

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
        raise RowError(f"an image is a {type(value).__name__}, not bytes or a path")

    def read_all(self, value: object) -> tuple[bytes, ...]:
        """Read the images of a list, a single image, or none for None and the empty list."""
        if value is None:
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
        why = error.strerror if isinstance(error, OSError) and error.strerror else describe_error(error)
        raise RowError(
            f"the image file {printable(str(Path(path) if Path(path).is_absolute() else place.absolute()))} cannot be "
            f"read ({why}); give the bytes, or the path of a file that every machine can read"
        ) from error
