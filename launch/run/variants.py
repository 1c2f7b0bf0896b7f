"""Names of what answers an evaluation: weights, and the system message that the questions come with.

`base`, `adapter`, `best`, `merged`, `checkpoint-40`, and `shuffled` (the adapter, with images exchanged); each also as
`NAME-no-prompt`. What `--prompt FILE` asks is called `NAME-prompt-<stem of the file>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError
from launch.untrusted_files import DOCUMENT, UNREADABLE, read_text, reason_of

VARIANT_WEIGHTS = ("base", "adapter", "best", "shuffled", "merged")
_AGAINST = ("base", "merged", "shuffled", "adapter", "best")
NO_PROMPT = "-no-prompt"
_OF_A_FILE = "-prompt-"
_CHECKPOINT = r"checkpoint-(0|[1-9][0-9]{0,17})"
_NAME = re.compile(
    rf"(?P<weights>{'|'.join(VARIANT_WEIGHTS)}|{_CHECKPOINT})(?P<prompt>{NO_PROMPT}|{_OF_A_FILE}[A-Za-z0-9._-]+)?"
)


@dataclass(frozen=True)
class VariantName:
    """A name in its parts. `prompt`: the suffix, empty for the recipe's own system message."""

    weights: str
    prompt: str = ""

    def __str__(self) -> str:
        return f"{self.weights}{self.prompt}"

    @property
    def step(self) -> int | None:
        """The step of `checkpoint-<step>`; None of any other."""
        return int(self.weights.partition("-")[2]) if self.weights.startswith("checkpoint-") else None


def parse_variant(name: str) -> VariantName:
    """A name in its parts. ValueError when it is none."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names nothing that answers")
    return VariantName(match["weights"], match["prompt"] or "")


def parse_models(value: str, of_files: bool = False) -> str:
    """Names separated by commas, as `--models` takes them, each once. `of_files`: also `NAME-prompt-FILE`.

    Raises:
        ConfigError: a word is no name.
    """
    words = list(dict.fromkeys(word.strip(" ") for word in value.split(",")))
    unknown = [word for word in words if not _is_name(word, of_files)]
    if unknown:
        shown = ", ".join(
            word[:60] if word and word.isprintable() else ascii(word[:60]) for word in unknown[:5]
        )
        raise ConfigError(
            f"--models: unknown {shown}; choose of {', '.join(VARIANT_WEIGHTS)}, checkpoint-STEP, "
            f"each also with {NO_PROMPT}"
        )
    return ",".join(words)


def _is_name(word: str, of_files: bool) -> bool:
    return _NAME.fullmatch(word) is not None and (of_files or _OF_A_FILE not in word)


def with_prompt(models: Sequence[str], suffix: str) -> tuple[str, ...]:
    """The same names, asked with another system message where they do not name their own."""
    names = (parse_variant(model) for model in models)
    return tuple(dict.fromkeys(str(VariantName(name.weights, name.prompt or suffix)) for name in names))


def prompt_option(value: str) -> tuple[str, Path | None]:
    """`--prompt`: the suffix of what is asked with it, and the file that holds the system message, if one does.

    Raises:
        ConfigError: it is neither `none` nor `recipe` nor a file with text.
    """
    if value in ("recipe", "none"):
        return ("" if value == "recipe" else NO_PROMPT), None
    file = Path(value).expanduser()
    read_prompt(file)
    return file_suffix(file), file.absolute()


def file_suffix(file: Path) -> str:
    """The suffix of what is asked with the system message of a file."""
    return _OF_A_FILE + (re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem) or "file")


def read_prompt(file: Path) -> str:
    """The system message in a file. ConfigError when there is none."""
    try:
        message = read_text(file, DOCUMENT).strip()
    except UNREADABLE as error:
        raise ConfigError(
            f"--prompt: {file} cannot be read ({reason_of(error)}); give none, recipe or a text file"
        ) from None
    if not message:
        raise ConfigError(f"--prompt: {file} holds no text; give none, recipe or a text file")
    return message


def in_order(models: Sequence[str]) -> list[str]:
    """From the base to what was made of it, checkpoints by step: the order of a table's columns."""
    return _sorted(models, VARIANT_WEIGHTS)


def from_worse_to_better(models: Sequence[str]) -> list[str]:
    """As one hopes: the order in which two are compared, what was lost or gained by the second."""
    return _sorted(models, _AGAINST)


def _sorted(models: Sequence[str], weights: Sequence[str]) -> list[str]:
    def key(model: str) -> tuple[int, int, int, str]:
        name = parse_variant(model)
        step = name.step  # before the adapter, which is of the last one
        rank = 2 * weights.index("adapter" if step is not None else name.weights) - (step is not None)
        return rank, step or 0, {NO_PROMPT: 0, "": 2}.get(name.prompt, 1), model

    return sorted(dict.fromkeys(models), key=key)
