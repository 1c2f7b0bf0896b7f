"""The safetensors files of a base model, read and written block by block.

The safetensors library (0.8) writes a file from tensors that are all in memory. A base model's shard is several GB,
so files are written here from a stream of row blocks; the format is an eight byte length, a JSON header and
the data (https://huggingface.co/docs/safetensors#format).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import Field, NonNegativeInt, RootModel

from launch.errors import CheckpointError
from launch.untrusted_files import TABLE, open_plain, parse_json, printable
from trainer.formats.validated import FileSchema, checked, inside, read_json_object, unreadable_is_refused

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000  # the most that safetensors 0.8 itself reads
BLOCK_ELEMENTS = 1 << 22  # 16 MiB in fp32: large enough to be fast, small against any shard


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what its bytes mean and where they are (`begin`: from the start of the file)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def rows(self) -> int:
        """Size of the first axis (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def bytes_as(self, dtype: str) -> int:
        """Return the bytes of this tensor when stored as `dtype`."""
        return self.elements * SAFETENSORS_DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    header_bytes: int


class _Stored(FileSchema):
    """One tensor in a safetensors header; `data_offsets` count from the end of the header."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: list[NonNegativeInt] = Field(min_length=2, max_length=2)


class _Tensors(RootModel[dict[str, _Stored]]):
    """All tensors of a safetensors file by name."""


class _Metadata(RootModel[dict[str, str]]):
    """What a safetensors header says beside its tensors."""


class _Index(FileSchema):
    """What is read of `*.index.json`."""

    weight_map: dict[str, str] = Field(min_length=1)
    metadata: dict[str, Any] | None = None


def read_shard(path: Path) -> Shard:
    """Reads a file's header. A file that is cut short or no safetensors file is a CheckpointError."""
    with unreadable_is_refused(path), open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: not a complete safetensors file ({size} bytes); copy it again")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: its safetensors header is said to have {length:,} bytes (at most {MAX_HEADER_BYTES:,}); "
                "copy it again"
            )
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: unreadable safetensors header ({error}); copy it again") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    metadata = checked(_Metadata, metadata, path).root
    tensors = checked(_Tensors, header, path).root
    unknown = {stored.dtype for stored in tensors.values()} - set(SAFETENSORS_DTYPES)
    if unknown:
        raise CheckpointError(
            f"{path}: tensors stored as {printable(', '.join(sorted(unknown))[:200])}; use the unquantized weights"
        )
    end = 8 + length + max((stored.data_offsets[1] for stored in tensors.values()), default=0)
    if size != end:
        raise CheckpointError(f"{path}: {size} bytes where its header says {end}; copy the file again")
    return Shard(path, metadata, _entries(path, tensors, 8 + length), 8 + length)


def _entries(path: Path, tensors: dict[str, _Stored], start: int) -> dict[str, Entry]:
    """Return the tensors in the order of their bytes, which must be as many as their shapes need, and nobody else's."""
    entries, last = {}, 0
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = stored.data_offsets
        entries[name] = Entry(stored.dtype, tuple(stored.shape), start + begin)
        if end - begin != entries[name].bytes_as(stored.dtype):
            raise CheckpointError(
                f"{path}: {printable(name)} has {end - begin} bytes for {stored.dtype} {stored.shape}; copy the file "
                "again"
            )
        if begin != last:
            raise CheckpointError(
                f"{path}: {printable(name)} begins at byte {begin:,} where the one before ends at {last:,}; copy the "
                "file again"
            )
        last = end
    return entries


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the file of every tensor, as `*.index.json` has it. CheckpointError: it is something else, or leads away."""
    weight_map = checked(_Index, read_json_object(index, TABLE), index).weight_map
    for name in set(weight_map.values()):
        inside(index.parent, name, index)
    return weight_map


def read_base_shards(base: Path) -> list[Shard]:
    """Return the safetensors files of a model folder: the single file, or all files that its index names.

    A missing file, and tensors in which index and files disagree, are a CheckpointError.
    """
    if (base / INDEX_FILE).exists():
        weight_map = read_weight_map(base / INDEX_FILE)
        names = sorted(set(weight_map.values()))
    elif (base / SINGLE_FILE).exists():
        weight_map, names = {}, [SINGLE_FILE]
    else:
        raise CheckpointError(
            f"{base}: no {SINGLE_FILE} and no {INDEX_FILE}; give the folder of the base model"
        )
    missing = [name for name in names if not (base / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{base}: {len(missing)} of {len(names)} weight files are missing ({printable(', '.join(missing))}); "
            "copy them again"
        )
    shards = [read_shard(base / name) for name in names]
    files = {tensor: shard.path.name for shard in shards for tensor in shard.entries}
    differing = sorted(
        name for name in files.keys() | weight_map.keys() if files.get(name) != weight_map.get(name)
    )
    if weight_map and differing:
        raise CheckpointError(
            f"{base / INDEX_FILE}: {len(differing)} tensors are elsewhere ({printable(', '.join(differing[:3]))}); "
            "index and files are of different models, copy them again"
        )
    return shards


def block_rows(entry: Entry) -> Iterator[tuple[int, int]]:
    """Row ranges [begin, end) of at most BLOCK_ELEMENTS elements (one row at least)."""
    step = max(1, BLOCK_ELEMENTS // max(1, entry.width))
    for begin in range(0, entry.rows if entry.width else 0, step):  # without a width there are no bytes
        yield begin, min(begin + step, entry.rows)


def read_block(file: BinaryIO, entry: Entry, begin: int, end: int) -> torch.Tensor:
    """Return rows [begin, end) as a tensor [rows, width] of the stored dtype."""
    dtype = SAFETENSORS_DTYPES[entry.dtype]
    file.seek(entry.begin + begin * entry.width * dtype.itemsize)
    count = (end - begin) * entry.width
    if count == 0:
        return torch.empty(end - begin, entry.width, dtype=dtype)
    data = bytearray(count * dtype.itemsize)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise CheckpointError(f"{file.name}: ended while it was read; copy the file again")
    return torch.frombuffer(data, dtype=dtype).view(end - begin, entry.width)


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the raw bytes of a tensor as uint8 (comparing values would call two NaN different)."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def write_shard(
    path: Path,
    shard: Shard,
    dtypes: dict[str, str],
    block: Callable[[BinaryIO, str, int, int], torch.Tensor],
    advance: Callable[[int], None],
) -> dict[str, bytes]:
    """Writes `shard` again as `path`: same tensors, order and metadata, each stored as `dtypes[name]`.

    `block(file, name, begin, end)` gives the rows to write, `file` being the open `shard`; `advance` is told the
    bytes of those rows in it.
    The file is on disk (fsync) when this returns: the sha256 of every tensor's bytes as they were to be written.
    """
    digests: dict[str, bytes] = {}
    with open_plain(shard.path) as source, path.open("wb") as target:
        target.write(_header(shard, dtypes))
        for name, entry in shard.entries.items():
            digest = hashlib.sha256()
            for begin, end in block_rows(entry):
                rows = block(source, name, begin, end).to(SAFETENSORS_DTYPES[dtypes[name]])
                data = tensor_bytes(rows).numpy().data
                digest.update(data)
                target.write(data)
                advance((end - begin) * entry.width * SAFETENSORS_DTYPES[entry.dtype].itemsize)
            digests[name] = digest.digest()
        target.flush()
        os.fsync(target.fileno())
    return digests


def _header(shard: Shard, dtypes: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    offset = 0
    for name, entry in shard.entries.items():
        end = offset + entry.bytes_as(dtypes[name])
        header[name] = {"dtype": dtypes[name], "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
