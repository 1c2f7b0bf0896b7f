"""Files that others wrote: what is missing, damaged or of another kind is a CheckpointError with the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from launch.errors import CheckpointError
from launch.units import decimal_size
from launch.untrusted_files import (
    DOCUMENT,
    UNREADABLE,
    UntrustedFileError,
    plain_size,
    printable,
    read_mapping,
    reason_of,
)
from trainer.base_files import is_inside


class FileSchema(BaseModel):
    """The keys of a file that are read, and of which kind their values must be; other keys may be there."""

    model_config = ConfigDict(strict=True, frozen=True)


Read = TypeVar("Read", bound=BaseModel)


@contextmanager
def unreadable_is_refused(file: Path | None = None) -> Iterator[None]:
    """Also a decorator: what the system does not let us read is a refusal by its name, not a traceback.

    `file`: which it is, where the system does not say (it names a file that cannot be opened, not one that ends in
    an error).
    """
    try:
        yield
    except UntrustedFileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(
            f"{printable(str(error.filename or file or 'a file'))}: cannot be read ({error.strerror or error}); copy "
            "it again, or change its permissions"
        ) from error


def read_json_object(file: Path, limit: int = DOCUMENT) -> dict[str, Any]:
    """Read the object in a JSON file of at most `limit` bytes. CheckpointError when it is missing or something else."""
    try:
        return read_mapping(file, limit)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{printable(str(file))}: cannot be read ({reason_of(error)}); copy it again"
        ) from error


def read_tensors(file: Path, advice: str = "copy it again") -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, mapped from the disk. CheckpointError when it is missing or damaged."""
    try:
        plain_size(file)  # the library would wait for a pipe
        return load_file(file)
    except (*UNREADABLE, SafetensorError, RuntimeError) as error:  # the last: torch finds no room to map it
        raise CheckpointError(
            f"{printable(str(file))}: cannot be read ({reason_of(error)}); {advice}"
        ) from error


def refuse_more_than_memory(size: int, file: Path) -> None:
    """CheckpointError when `size` bytes of `file` would not fit in free memory: a file may be full of holes."""
    if size > (free := psutil.virtual_memory().available):
        raise CheckpointError(
            f"{printable(str(file))}: needs {decimal_size(size)} of memory ({decimal_size(free)} are free); copy it "
            "again if it should be smaller, or take a machine with more memory"
        )


def inside(folder: Path, name: str, file: Path) -> Path:
    """Locate the file or folder `name`, which `file` says is in `folder`. CheckpointError when it would not be."""
    if not is_inside(name):
        raise CheckpointError(
            f"{printable(str(file))}: names a file outside of its folder ({printable(name)[:200]}); copy the "
            "checkpoint again"
        )
    return folder / name


def checked(layout: type[Read], values: object, file: Path) -> Read:
    """`values` of `file` as `layout` describes them. CheckpointError naming the first key that is of another kind."""
    try:
        return layout.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        tells_the_value = first["type"] in ("missing", "too_short", "value_error")
        shown = "" if tells_the_value else f", not {first['input']!r:.60}"
        reason = first["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
        raise CheckpointError(
            printable(
                f"{file}: {key or 'the whole'} is wrong ({reason[:1].lower()}{reason[1:]}{shown}); copy it again"
            )
        ) from None


def whole_number(value: object, file: Path, key: str) -> int:
    """Return a count that a file gives. CheckpointError when it is no whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{file}: {key} is no whole number from 0 on ({value!r:.60}); copy the checkpoint again"
        )
    return value
