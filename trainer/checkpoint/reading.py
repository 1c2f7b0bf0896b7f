"""Files that others wrote: what is missing, damaged or of another kind is a CheckpointError with the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from launch.errors import CheckpointError


class Layout(BaseModel):
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
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or file or 'a file'}: cannot be read ({error.strerror or error}); copy it again, or "
            "change its permissions"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError when it is missing or something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds no JSON object; copy it again")
    return values


def checked(layout: type[Read], values: object, file: Path) -> Read:
    """`values` of `file` as `layout` describes them. CheckpointError naming the first key that is of another kind."""
    try:
        return layout.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:2])
        told = first["type"] in ("missing", "too_short", "value_error")
        given = "" if told else f", not {first['input']!r:.60}"
        reason = first["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
        raise CheckpointError(
            f"{file}: {key or 'the whole'} is wrong ({reason[:1].lower()}{reason[1:]}{given}); copy it again"
        ) from None


def whole_number(value: object, file: Path, key: str) -> int:
    """A count that a file gives. CheckpointError when it is no whole number from 0 on."""
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{file}: {key} is no whole number from 0 on ({value!r:.60}); copy the checkpoint again"
        )
    return value
