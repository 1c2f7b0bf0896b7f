"""An adapter's `adapter_model.safetensors`, read without torch: whether it is whole, and what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LENGTH = 8  # bytes before the header that say how long it is, little-endian


def is_whole(adapter: Path) -> bool:
    """The folder has an adapter whose weights' file is as long as its header says."""
    try:
        places, begin = _places(adapter / WEIGHTS)
        ends = [last for _, last in places.values()]
        size = (adapter / WEIGHTS).stat().st_size
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return (adapter / CONFIG).is_file() and bool(ends) and begin + max(ends) == size


def read_digest(adapter: Path) -> str | None:
    """Of the adapter in a folder, as `digest_of`; None where none can be read."""
    if not is_whole(adapter):
        return None
    try:
        places, begin = _places(adapter / WEIGHTS)
        content = memoryview((adapter / WEIGHTS).read_bytes())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return digest_of({name: content[begin + first : begin + last] for name, (first, last) in places.items()})


def digest_of(tensors: Mapping[str, bytes | memoryview]) -> str:
    """Of an adapter's tensors by name; not of its file, for a checkpoint of another form holds the same ones."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])}\n".encode())
        digest.update(tensors[name])
    return digest.hexdigest()


def _places(file: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each tensor's bytes lie (first, behind the last), counted from the number that comes second."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file}: a header of {length} bytes")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: tuple(entry["data_offsets"]) for name, entry in header.items()}, _LENGTH + length
