"""How `samestep` is called here: the commands that are printed work as they stand, on the PATH or not."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

VARIABLE = "SAMESTEP_COMMAND"  # tells the children, which were started otherwise


def remember_command() -> None:
    """Called by the command itself: a path that the PATH would not lead to is how it must be typed."""
    os.environ.pop(VARIABLE, None)
    program, installed = Path(sys.argv[0]), shutil.which("samestep")
    if program.name != "samestep" or len(program.parts) == 1 or not program.is_file():
        return
    if installed is None or not program.samefile(installed):
        here = Path.cwd()
        path = program.absolute()
        os.environ[VARIABLE] = shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def command() -> str:
    """What to type for `samestep`."""
    return os.environ.get(VARIABLE, "samestep")


def as_typed(text: str) -> str:
    """A message whose commands in backticks can be typed here."""
    return text.replace("`samestep ", f"`{command()} ")
