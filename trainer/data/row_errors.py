"""What is wrong with a row: a bad row in `samestep prepare`, and a failure that names the row everywhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from launch.errors import RunError, SamestepError
from launch.untrusted_files import printable

LONGEST_REASON = 300


class RowError(Exception):
    """A row cannot be used: the message says why, in words; whoever catches it knows which row it is."""


def describe_value(value: object) -> str:
    """Say what stands where something else is due: a missing value, or its type and, where that says more, itself."""
    if value is None:
        return "missing"
    tells = isinstance(value, str | list) or (isinstance(value, float) and not math.isfinite(value))
    return (
        f"{type(value).__name__} {printable(repr(value))[:60]}"
        if tells
        else f"of type {type(value).__name__}"
    )


def describe_error(error: BaseException) -> str:
    """Say an error of a library in one line: its type and its words, without the address of the object it was about."""
    kind = type(error).__name__
    kind = f"{type(error).__module__}.{kind}" if kind == "error" else kind  # such as struct.error
    words = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "it", str(error))
    return printable(f"{kind}: {words}" if words else kind)[:LONGEST_REASON]


@contextmanager
def naming_row(row: str) -> Iterator[None]:
    """Turn whatever is raised while one row is read, decoded or encoded into a RunError that begins with `row`.

    Pillow alone raises a dozen types for damaged files.
    """
    try:
        yield
    except SamestepError:
        raise
    except RowError as error:
        raise RunError(f"{row}: {error}; `samestep prepare` finds and lists such rows") from error
    except Exception as error:
        raise RunError(
            f"{row}: cannot be read ({describe_error(error)}); `samestep prepare` finds and lists such rows"
        ) from error
