"""The folder of a base model, looked at before transformers opens what lies in it.

transformers 5.23 opens every file of a folder by its name, whatever it is: a pipe is waited for, a link to a device
read for ever. It joins the names of `*.index.json` to the folder, wherever they lead, and builds as many layers as
config.json names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from launch.errors import ConfigError
from launch.untrusted_files import DOCUMENT, TABLE, UNREADABLE, plain_size, printable, read_mapping, reason_of

INDEX = "model.safetensors.index.json"
_SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json",
)  # fmt: skip
_MOST = {
    "num_hidden_layers": 1000,
    "depth": 1000,
    "hidden_size": 10**6,
    "embed_dim": 10**6,
    "intermediate_size": 10**7,
    "vocab_size": 10**8,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "num_heads": 10**4,
}
"""The most that config.json may say: far above any model, far below what hangs."""


def is_inside(name: str) -> bool:
    """Return whether a name is relative and stays below its folder. Links are allowed: the hub's cache has them."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def refuse_unsafe_base(folder: Path, key: str | None = "model.name_or_path") -> None:
    """Hold every file of a base model's folder, which `key` of a recipe names, against what it is taken for.

    Raises:
        ConfigError: a file is no plain file, no JSON object, or says what cannot be.
    """
    named = f"{key}: " if key else ""
    try:
        problems = [f"{named}{problem}; get the model again" for problem in _problems(folder)]
    except UNREADABLE as error:
        raise ConfigError(
            f"{named}{printable(str(folder))}: cannot be read ({reason_of(error)}); get the model again"
        ) from error
    if problems:
        raise ConfigError(problems)


def _problems(folder: Path) -> Iterator[str]:
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if file.is_dir() or not file.exists():  # a link to nothing is missing, and said so by who needs it
            continue
        try:
            plain_size(file)
            if file.name in _SETTINGS or file.name == INDEX:
                yield from _impossible(
                    file, read_mapping(file, TABLE if file.name == INDEX else 4 * DOCUMENT)
                )
        except UNREADABLE as error:
            yield f"{printable(str(file))}: cannot be read ({reason_of(error)})"


def _impossible(file: Path, values: dict[str, Any]) -> Iterator[str]:
    if file.name == INDEX:
        files = values.get("weight_map")
        named = files.values() if isinstance(files, dict) else []
        outside = [name for name in named if isinstance(name, str) and not is_inside(name)]
        if outside:
            yield f"{printable(str(file))}: names a file outside of its folder ({printable(outside[0])[:200]})"
        elif not all(isinstance(name, str) for name in named):
            yield f"{printable(str(file))}: weight_map names what is no file"
    if file.name == "config.json":
        for part in (values, values.get("text_config"), values.get("vision_config")):
            sizes = part if isinstance(part, dict) else {}
            for key, most in _MOST.items():
                value = sizes.get(key)
                if isinstance(value, int | float) and not 0 <= value <= most:
                    yield f"{printable(str(file))}: says {key}: {value} (at most {most:,})"
