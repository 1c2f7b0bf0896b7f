"""Distributed checkpoints (DCP): a pickled `.metadata`, and files of every rank's parts, read without running code."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.errors import CheckpointError
from launch.untrusted_files import printable, read_bytes
from trainer.formats.torch_files import DAMAGED, refuse_expanding, why_damaged
from trainer.formats.validated import inside, refuse_more_than_memory

METADATA_BYTES = 2**26
"""The most of a `.metadata`: a 72B model's of 64 ranks takes a fifth of it."""

# What torch 2.14 itself puts into the `.metadata` of a distributed checkpoint.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}  # fmt: skip


class _MetadataUnpickler(pickle._Unpickler):
    """Python's own: the one in C makes room for as many objects as a file says that it will remember."""

    def find_class(self, module: str, name: str) -> Any:
        known = _METADATA_CLASSES.get((module, name))
        if known is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            known = getattr(torch, name)
        if known is None:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no distributed checkpoint needs")
        return known


class _Reader(filesystem.FileSystemReader):
    """torch's reader; its own `read_metadata` (torch 2.14) unpickles whatever is in the file."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return read_metadata(Path(self.path))

    def _slice_file(self, file: Any, sinfo: filesystem._StorageInfo) -> IO[bytes]:
        content = super()._slice_file(file, sinfo).read()
        refuse_expanding(io.BytesIO(content), len(content))
        return io.BytesIO(content)


def read_metadata(folder: Path) -> metadata.Metadata:
    """Read what a distributed checkpoint (DCP) says it holds, and compare it with its files.

    Raises:
        CheckpointError: it is no Metadata; or a file with a part of a tensor is missing, cut short, or smaller than
            what it is said to hold; all of them are named.
    """
    file = folder / ".metadata"
    try:
        content = io.BytesIO(read_bytes(file, METADATA_BYTES))
        dcp_metadata = _MetadataUnpickler(content).load()
        _refuse_no_metadata(dcp_metadata)
    except FileNotFoundError:
        raise CheckpointError(
            f"{printable(str(file))}: is missing, so the checkpoint was never completed; use an older one"
        ) from None
    except (*DAMAGED, RecursionError) as error:
        raise CheckpointError(
            f"{printable(str(file))}: cannot be read ({why_damaged(error)}); copy the checkpoint again"
        ) from error
    _refuse_other_files(folder, dcp_metadata)
    if dcp_metadata.storage_meta is None:
        dcp_metadata.storage_meta = metadata.StorageMeta()
    return cast(metadata.Metadata, dcp_metadata)


def _refuse_no_metadata(dcp_metadata: Any) -> None:
    """ValueError when it is not what torch 2.14 writes: any object of the permitted classes could be in the file."""
    if type(dcp_metadata) is not metadata.Metadata:
        raise ValueError(f"it holds a {type(dcp_metadata).__name__}, no Metadata")
    tensors, places = vars(dcp_metadata).get("state_dict_metadata"), vars(dcp_metadata).get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise ValueError("its Metadata names no tensors and no files")
    for name, kind in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"it names a tensor {name!r:.60}")
        if isinstance(kind, TensorStorageMetadata):
            _refuse_no_pieces(name, kind)
    for index, place in places.items():
        values = vars(place)
        whole = all(type(values.get(key)) is int and values[key] >= 0 for key in ("offset", "length"))
        if not isinstance(values.get("relative_path"), str) or not whole or not isinstance(index.fqn, str):
            raise ValueError(f"it holds no place of {index!r:.60}")
        if values.get("transform_descriptors"):
            raise ValueError(f"{index.fqn:.60} is stored by {values['transform_descriptors']!r:.60}")


def _refuse_no_pieces(name: str, kind: TensorStorageMetadata) -> None:
    """ValueError when a tensor has no size and dtype, or its pieces are not all of it."""
    sizes = [kind.size, *(size for chunk in kind.chunks for size in (chunk.sizes, chunk.offsets))]
    if not all(isinstance(size, torch.Size) and min(size, default=0) >= 0 for size in sizes):
        raise ValueError(f"it holds no size of {name!r:.60}")
    if not isinstance(kind.properties.dtype, torch.dtype):
        raise ValueError(f"it holds no dtype of {name!r:.60}")
    pieces = sum(math.prod(chunk.sizes) for chunk in kind.chunks)
    if pieces != math.prod(kind.size):
        raise ValueError(f"its pieces of {name!r:.60} are {pieces:,} numbers of {math.prod(kind.size):,}")


def _refuse_other_files(folder: Path, dcp_metadata: metadata.Metadata) -> None:
    """CheckpointError when the files are not those that hold what the Metadata says."""
    needed: dict[str, int] = {}
    held: dict[str, int] = {}
    stored: dict[str, int] = {}
    for index, place in dcp_metadata.storage_data.items():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        held[place.relative_path] = held.get(place.relative_path, 0) + place.length
        stored[index.fqn] = stored.get(index.fqn, 0) + place.length
    problems = []
    for name, size in sorted(needed.items()):
        file = inside(folder, name, folder / ".metadata")
        shown = printable(str(file))
        if not file.is_file():
            problems.append(
                f"{shown}: is missing ({len(needed)} files belong together); copy the checkpoint again"
            )
        elif (there := file.stat().st_size) < max(size, held[name]):
            problems.append(
                f"{shown}: is cut short ({there} of {max(size, held[name])} bytes); copy it again"
            )
    for name, kind in dcp_metadata.state_dict_metadata.items():
        if not isinstance(kind, TensorStorageMetadata):
            continue
        if (claimed := _bytes_of(kind)) > stored.get(name, 0):
            problems.append(
                f"{printable(str(folder / '.metadata'))}: {printable(name)} is said to have {claimed:,} bytes, of "
                f"which {stored.get(name, 0):,} are stored; copy the checkpoint again"
            )
    if problems:
        raise CheckpointError("\n".join(problems[:20]))


def _bytes_of(kind: TensorStorageMetadata) -> int:
    return math.prod(kind.size) * kind.properties.dtype.itemsize


def distributed_keys(folder: Path) -> list[str]:
    """Return the names of the tensors in a distributed checkpoint (DCP). CheckpointError as `read_metadata`."""
    stored = read_metadata(folder).state_dict_metadata
    return [name for name, kind in stored.items() if isinstance(kind, TensorStorageMetadata)]


def load_distributed(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Whole tensors of a distributed checkpoint, put together from every rank's part, without a process group."""
    reader = _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    kinds = {name: kind for name in names if isinstance(kind := stored.get(name), TensorStorageMetadata)}
    if gone := sorted(set(names) - kinds.keys()):
        raise CheckpointError(
            f"{printable(str(folder))}: holds no tensor {printable(gone[0])}; copy the checkpoint again"
        )
    refuse_more_than_memory(sum(map(_bytes_of, kinds.values())), folder)
    state: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()
    }
    if state:
        try:
            with warnings.catch_warnings():
                # On one process it is meant to be.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                state_dict_loader.load(state, storage_reader=reader, no_dist=True)
        except (*DAMAGED, CheckpointException) as error:  # the latter is no Exception
            cause = (
                next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            )
            raise CheckpointError(
                f"{printable(str(folder))}: cannot be read ({why_damaged(cause)}); copy the checkpoint again"
            ) from error
    return state
