"""The files of a user's own metrics (`module:function` of `evaluation.metrics`), looked at without running them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from launch.recipe.contradictions import METRIC_NAMES
from launch.recipe.schema import Recipe
from launch.untrusted_files import UNREADABLE, printable, read_text, reason_of


def metric_file(name: str) -> tuple[Path, str]:
    """The file and the function of `module:function`."""
    file, _, function = name.rpartition(":")
    return Path(file if file.endswith(".py") else f"{file}.py"), function


def why_no_metric(recipe: Recipe) -> str | None:
    """Say which metric of the recipe has no file, or one without such a function; None: all have one."""
    names = recipe.evaluation.metrics
    for name in names if isinstance(names, list) else ():
        if name not in METRIC_NAMES and (reason := _why_not(*metric_file(name))):
            return f"{printable(name)}: {reason}"
    return None


def _why_not(file: Path, function: str) -> str | None:
    if not file.is_file():
        return f"there is no file {printable(str(file))}; put it beside the recipe"
    try:
        text = read_text(file)
        ast.parse(text)
    except UNREADABLE as error:
        return f"{printable(str(file))} cannot be read ({reason_of(error)}); correct it"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        return f"{printable(str(file))} is no Python ({line}{printable(getattr(error, 'msg', str(error)))}); correct it"
    if not re.search(rf"\b{re.escape(function)}\b", text):
        return (
            f"{printable(str(file))} has no function {function}; define {function}(prediction: str, labels: list[str]) "
            "-> float"
        )
    return None
