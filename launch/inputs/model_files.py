"""Which files of a model's folder are loaded; and what older versions took for the model's identity. Torch-free."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from launch.errors import ConfigError
from launch.untrusted_files import (
    DOCUMENT,
    TABLE,
    UNREADABLE,
    open_plain,
    printable,
    read_bytes,
    read_mapping,
    read_text,
    reason_of,
)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES: dict[str, tuple[str, ...]] = {
    "model.config": ("config.json",),
    "model.processor": (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    ),
    "model.chat_template": ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    "model.tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ),
    "model.generation": ("generation_config.json",),
}
"""Part of a model besides its weights -> the files it is made of, as far as they are there."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers loads from a model's folder, at least one.

    Raises:
        ConfigError: there are none, the index of a sharded model cannot be read, or a file that it names is missing.
    """
    if (folder / SINGLE_FILE).is_file():  # transformers 5.23 looks for it first
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        names = _names_of(folder / INDEX_FILE)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConfigError(
                f"model.name_or_path: {folder} lacks weight files ({len(missing)} of {len(names)}: "
                f"{', '.join(missing[:3])}); copy them again"
            )
        return [folder / name for name in names]
    others = sorted(
        file.name for file in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.safetensors")]
    )
    contents = f"it has {', '.join(others[:3])}" if others else "no weight file is there"
    raise ConfigError(
        f"model.name_or_path: {folder} has no {SINGLE_FILE} and no {INDEX_FILE} ({contents}); other forms cannot be "
        "told apart or merged into: save the model with `save_pretrained` of transformers 5 and name that folder"
    )


def _names_of(index: Path) -> list[str]:
    try:
        named = read_mapping(index, TABLE).get("weight_map")
    except OSError as error:
        raise ConfigError(
            f"model.name_or_path: {index} cannot be read ({error.strerror}); get the model again"
        ) from None
    names = [*named.values()] if isinstance(named, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ConfigError(f"model.name_or_path: {index} names no files of its folder; get the model again")
    return sorted({*names})


def part_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each part that are in a model's folder, by `MODEL_FILES`."""
    return {
        part: [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        for part, patterns in MODEL_FILES.items()
    }


def hub_commit(folder: Path) -> str | None:
    """Return the commit of a snapshot in the hub's cache; None for any other folder, whatever its name."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached and COMMIT.fullmatch(folder.name) else None


def old_base_identity(folder: Path) -> str:
    """Return what versions before the identity by parts recorded of a base: the commit of a hub model, else a sample.

    sha256 over config.json and 64 blocks of 64 KiB of each weight file. Only ever compared with what they recorded.
    """
    if (commit := hub_commit(folder)) is not None:
        return commit
    digest = hashlib.sha256(read_bytes(folder / "config.json", 4 * DOCUMENT))
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open_plain(file) as handle:
            for block in range(64):
                handle.seek(block * max(0, size - 2**16) // 63)
                digest.update(handle.read(2**16))
    return digest.hexdigest()


def old_kind(identity: object) -> str | None:
    """Name the kind of an older version's record: `commit`, `sample`; None for a folder's name: it proves nothing."""
    if not isinstance(identity, str):
        return None
    if COMMIT.fullmatch(identity):
        return "commit"
    return "sample" if _DIGEST.fullmatch(identity) else None


def read_own_template(file: str | Path) -> str:
    """The text of the file that `data.chat_template` names. ConfigError: it cannot be read."""
    try:
        return read_text(file)
    except UNREADABLE as error:
        raise ConfigError(
            f"data.chat_template: {printable(str(file))} cannot be read ({reason_of(error)}); give a file with a Jinja "
            "template, or null"
        ) from error
