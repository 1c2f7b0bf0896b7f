"""The file of one image's features: a header of 128 bytes, then the values [V, hidden] as they lie in memory.

Little-endian: magic (8 bytes), xxh3_64 of everything behind it (8), version, dtype, hidden size and the patches in
time, height and width (4 each), the key of what made them (16), the sha256 of the image's encoded bytes (32), zeros.
Size and checksum are held against the content before a value is used, so nothing has to be brought to disk in order:
what a power cut leaves torn is seen.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from launch.untrusted_files import UntrustedFileError, open_plain

MAGIC = b"smstpfea"
VERSION = 1
HEADER_BYTES = 128
MAX_FILE_BYTES = 2**30
"""Of a file that is read: ten times the features of the largest image that a Qwen2-VL takes."""
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that are stored, by their number in the header."""

_BEGIN = struct.Struct("<8sQ")
_FACTS = struct.Struct("<6I16s32s")


@dataclass(frozen=True)
class Kind:
    """What the features of one folder have in common.

    `key`: 16 bytes that name what made them; `merge`: patches along one edge of a visual token.
    """

    key: bytes
    dtype: torch.dtype
    hidden: int
    merge: int

    def bytes_of(self, visual_tokens: int) -> int:
        """The size of an image's file."""
        return HEADER_BYTES + visual_tokens * self.hidden * self.dtype.itemsize


@dataclass(frozen=True)
class Features:
    """An image's `values` [V, hidden] and its `grid`: patches in time, height and width."""

    values: Tensor
    grid: tuple[int, int, int]


class FlawError(Exception):
    """Why a file's content cannot be used."""


def encode(kind: Kind, image: str, features: Features) -> tuple[bytes, memoryview]:
    """(header, values) of a file; `image`: the sha256 of the image's encoded bytes, hexadecimal."""
    values = features.values.contiguous()
    if (values.dtype, values.shape[1]) != (kind.dtype, kind.hidden):
        raise ValueError(f"features of {values.dtype} x {values.shape[1]}, not {kind.dtype} x {kind.hidden}")
    content = values.view(torch.uint8).numpy().data.cast("B")
    numbers = (VERSION, STORED_DTYPES.index(values.dtype), values.shape[1], *features.grid)
    facts = _FACTS.pack(*numbers, kind.key, bytes.fromhex(image)).ljust(HEADER_BYTES - _BEGIN.size, b"\0")
    return _BEGIN.pack(MAGIC, _checksum(facts, content)) + facts, content


def read(path: Path, kind: Kind, image: str) -> Features:
    """The features in a file, read at once.

    Raises:
        FlawError: it is torn, damaged, no plain file, or holds something else than `kind` and `image` say.
        OSError: it is missing or cannot be read.
    """
    try:
        opened = open_plain(path, MAX_FILE_BYTES, buffering=0)
    except UntrustedFileError as error:
        raise FlawError(error.reason) from None
    with opened as file:
        content = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
        view = content.numpy().data
        got = 0
        while got < len(view) and (count := file.readinto(view[got:])):  # type: ignore[attr-defined]  # one read, but for files above 2 GiB
            got += count
    if got < HEADER_BYTES or got != len(view):
        raise FlawError(f"it is cut off ({got} bytes)")
    magic, checksum = _BEGIN.unpack_from(view)
    if magic != MAGIC:
        raise FlawError("it is no file of features")
    facts, values = view[_BEGIN.size : HEADER_BYTES], view[HEADER_BYTES:]
    version, dtype, hidden, time, height, width, key, digest = _FACTS.unpack_from(facts)
    if version != VERSION:
        raise FlawError(f"it is of version {version}, this is {VERSION}")
    if (
        key != kind.key
        or dtype >= len(STORED_DTYPES)
        or STORED_DTYPES[dtype] != kind.dtype
        or hidden != kind.hidden
    ):
        raise FlawError("another vision tower or other settings made it")
    if digest.hex() != image:
        raise FlawError("it belongs to another image")
    visual = time * height * width // kind.merge**2
    if got != kind.bytes_of(visual):
        raise FlawError(f"it has {got} bytes of {kind.bytes_of(visual)}")
    if checksum != _checksum(facts, values):
        raise FlawError("its checksum is wrong")
    return Features(content[HEADER_BYTES:].view(kind.dtype).view(visual, hidden), (time, height, width))


def _checksum(facts: bytes | memoryview, values: memoryview) -> int:
    digest = xxhash.xxh3_64(facts)
    digest.update(values)
    return digest.intdigest()
