"""What may stand on a command line: each kind of value is judged here, before a command looks at anything else.

Every function makes the `parser` of an option of typer, which also reads its default. A value that cannot be is a
ConfigError: one line that names the option.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launch.errors import ConfigError

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"

T = TypeVar("T")
MOST_PROCESSES = 65_536
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:%-]{0,251}[A-Za-z0-9])?|::[A-Za-z0-9.:%]*")
_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, of Linux's file systems


def text(option: str) -> Callable[[str], str]:
    """Words that can be shown and written: not none, nothing that is no character of a line."""
    return lambda value: line_of_text(option, value)


def place(option: str) -> Callable[[str], Path]:
    """A path that the system could have, whether there is something or not; `~` is the home folder."""

    def parse(value: str | os.PathLike[str]) -> Path:
        path = Path(line_of_text(option, os.fspath(value), "give a path"))
        parts = [len(os.fsencode(part)) for part in path.parts]
        if max(parts, default=0) > _LONGEST_NAME or sum(parts) + len(parts) > _LONGEST_PATH:
            raise ConfigError(f"{option}: {_shown(str(path))} is too long for a path; give another one")
        try:
            return path.expanduser()
        except RuntimeError:
            raise ConfigError(
                f"{option}: {_shown(str(path))} is in the home of no user here; give another path"
            ) from None

    return parse


def named(option: str) -> Callable[[str], str]:
    """Something by its name or by its path, as it was written."""

    def parse(value: str) -> str:
        place(option)(value)
        return value

    return parse


def whole(option: str, least: int, most: int = MOST_PROCESSES) -> Callable[[str], int]:
    """A whole number within bounds."""

    def parse(value: str | int) -> int:
        digits = str(value)
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", digits) or not least <= int(digits) <= most:
            raise ConfigError(
                f"{option}: {_shown(digits)} cannot be; give a whole number, at least {least}, at most {most:,}"
            )
        return int(digits)

    return parse


def whole_numbers(option: str, least: int) -> Callable[[str], tuple[int, ...]]:
    """One whole number, or several that differ, separated by commas."""

    def parse(value: str | int | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers = tuple(whole(option, least)(word.strip(" ")) for word in str(value).split(","))
        if twice := [number for number in numbers if numbers.count(number) > 1]:
            raise ConfigError(
                f"{option}: {twice[0]} is there {numbers.count(twice[0])} times; give each once"
            )
        return numbers

    return parse


def step_range(option: str) -> Callable[[str], tuple[int, int]]:
    """Parse `40:45`, or `40` for one step; steps count from 1."""

    def parse(value: str | tuple[int, int]) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, colon, last = value.partition(":")
        is_count = [each.isascii() and each.isdigit() and len(each) < 12 for each in (first, last or first)]
        numbers = (int(first), int(last or first)) if all(is_count) else (0, 0)
        if not 1 <= numbers[0] <= numbers[1] or (colon and not last):
            raise ConfigError(f"{option}: {_shown(value)} is no range of steps; give one such as 40:45")
        return numbers

    return parse


def positive(option: str) -> Callable[[str], float]:
    """A number above 0 that is finite."""

    def parse(value: str | float) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ConfigError(f"{option}: {_shown(str(value))} cannot be; give a number above 0")
        return number

    return parse


def one_of(option: str, choices: Sequence[str], remedy: str = "choose one") -> Callable[[str], str]:
    """One of a few words."""

    def parse(value: str) -> str:
        if value not in choices:
            raise ConfigError(f"{option}: {_shown(value)} is none of {', '.join(choices)}; {remedy}")
        return value

    return parse


def several_of(option: str, choices: Sequence[str], none: bool = False) -> Callable[[str], str]:
    """Some of a few words, separated by commas; `none`: or nothing at all."""

    def parse(value: str) -> str:
        words = [word.strip(" ") for word in value.split(",")]
        unknown = [
            word[:60] if word and word.isprintable() else _shown(word)
            for word in words
            if word not in choices
        ]
        if unknown and not (none and value == ""):
            raise ConfigError(f"{option}: unknown {', '.join(unknown[:5])}; choose of {', '.join(choices)}")
        return ",".join(words)

    return parse


def host(option: str) -> Callable[[str], str]:
    """A name or an address of a machine."""

    def parse(value: str) -> str:
        if not _HOST.fullmatch(value):
            raise ConfigError(
                f"{option}: {_shown(value)} is no host; give a name or an address without a port"
            )
        return value

    return parse


def for_argparse(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The same for an option of argparse, which names the option itself."""

    def convert(value: str) -> T:
        try:
            return parse(value)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None

    return convert


def add_option(
    parser: argparse.ArgumentParser,
    name: str,
    judge: Callable[..., Callable[[str], Any]],
    *limits: Any,
    **settings: Any,
) -> None:
    """Add an option or argument of argparse whose value `judge(name, *limits)` reads; `settings`: of `add_argument`."""
    parser.add_argument(name, type=for_argparse(judge(name, *limits)), **settings)


def line_of_text(option: str, value: str, remedy: str = "give one, or leave the option out") -> str:
    if not value.strip():
        raise ConfigError(f"{option}: {value!r} says nothing; {remedy}")
    if any(not char.isprintable() and unicodedata.category(char) != "Zs" for char in value):  # Zs: spaces
        raise ConfigError(f"{option}: {_shown(value)} holds what is no character of a line; {remedy}")
    return value


def _shown(value: str) -> str:
    return ascii(value if len(value) <= 60 else f"{value[:57]}...")
