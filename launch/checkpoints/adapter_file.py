"""An adapter's `adapter_model.safetensors`, read without torch: whether it is whole, and what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from launch.untrusted_files import UNREADABLE, plain_size, read_bytes, read_mapping

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST = 2**34  # bytes of an adapter that is read whole: all linear layers of a 72B at rank 256 are 13 GB


def is_whole(adapter: Path) -> bool:
    """The folder has an adapter whose weights' file is as long as its header says, and its settings."""
    return damaged_file(adapter) is None


def damaged_file(adapter: Path) -> Path | None:
    """Return the file for which a folder is no whole adapter: it is missing, cut or another thing; None: it is one."""
    from safetensors import SafetensorError, safe_open

    weights, config = adapter / ADAPTER_WEIGHTS, adapter / ADAPTER_CONFIG
    try:
        plain_size(weights)
        with safe_open(weights, "np") as opened:
            if not opened.keys():
                return weights
    except (*UNREADABLE, SafetensorError):
        return weights
    try:
        read_mapping(config)
    except UNREADABLE:
        return config
    return None


def read_digest(adapter: Path) -> str | None:
    """Return the digest of the adapter in a folder, as `digest_of`; None where none can be read."""
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(read_bytes(adapter / ADAPTER_WEIGHTS, _LARGEST))  # type: ignore[no-untyped-call]
    except (*UNREADABLE, SafetensorError):
        return None
    return digest_of({name: tensor["data"] for name, tensor in tensors})


def digest_of(tensors: Mapping[str, bytes | bytearray | memoryview]) -> str:
    """Return the sha256 of an adapter's tensors by name, not of its file: other forms of a checkpoint hold the same."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])}\n".encode())
        digest.update(tensors[name])
    return digest.hexdigest()
