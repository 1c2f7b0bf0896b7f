"""What is otherwise here than where a run was trained: versions, hardware, and library files that were changed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from launch.run.directory import RunDirectory
from launch.untrusted_files import UNREADABLE, open_plain, read_mapping
from launch.versions import PACKAGES

_KEYS = ("python", "platform", "device", "cuda", "threads")
_CODE = (".py", ".so")
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Change:
    """One value of the environment: where the run's newest attempt was, and here."""

    key: str
    recorded: str
    here: str

    def __str__(self) -> str:
        return f"{self.key} {self.recorded} -> {self.here}"


def environment_changes(run: RunDirectory, here: RunDirectory) -> tuple[Change, ...]:
    """Compare what the newest attempts of two runs have recorded of their machines; none where one has not."""
    recorded, now = _values(run), _values(here)
    return tuple(
        Change(key, recorded[key], now[key])
        for key in sorted(recorded.keys() & now.keys())
        if recorded[key] != now[key]
    )


def _values(run: RunDirectory) -> dict[str, str]:
    try:
        values: dict[str, Any] = read_mapping(run.environment_file)
        kept = {key: str(values[key]) for key in _KEYS if values.get(key) is not None}
        kernels = {f"attention of the {part}:": str(name) for part, name in values.get("kernels", {}).items()}
        return kept | kernels | {str(name): str(version) for name, version in values["versions"].items()}
    except (*UNREADABLE, LookupError, AttributeError):
        return {}


@cache
def altered_libraries() -> tuple[str, ...]:
    """Name the installed code files of the training's packages whose content is not what their wheels brought.

    Compares with the sha256 in every package's RECORD, which pip leaves; reads a few GB where PyTorch is for GPUs. A
    package without one (conda, a checkout) is passed over.
    """
    return tuple(f"{package}: {file}" for package in PACKAGES for file in _altered_files(package))


def _altered_files(package: str) -> Iterator[str]:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.hash is None or file.hash.mode != "sha256" or file.suffix not in _CODE:
            continue
        try:
            digest = _sha256(str(file.locate()))
        except UNREADABLE:
            continue  # a file that is gone changes no number
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
            yield str(file)


def _sha256(file: str) -> bytes:
    digest = hashlib.sha256()
    with open_plain(file) as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.digest()
