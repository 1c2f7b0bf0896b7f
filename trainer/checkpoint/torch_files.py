"""Files that torch pickled, read without running what is in them: tensors, numbers, texts, and nothing else.

`torch.load(weights_only=True)` refuses classes. DeepSpeed 0.19 puts four of its own into its files; what they hold
is not needed, so harmless stand-ins take their place and DeepSpeed's code is neither imported nor run.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.errors import CheckpointError


class _StandIn:
    """In the place of an object whose content nobody needs."""


_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]

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


# What torch 2.14's reader of pickles raises over flipped and missing bytes.
_DAMAGED = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, AssertionError, AttributeError, TypeError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


def load_torch(file: Path) -> Any:
    """The content of a file of `torch.save`, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or holds objects that only running code could make.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            # DeepSpeed's own writer makes no archive; of one, only what is looked at is read.
            mapped = zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing; copy the checkpoint again, with all its files") from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{file}: cannot be read ({reason}); copy the checkpoint again") from error


def load_mapping(file: Path) -> dict[Any, Any]:
    """The mapping in a file of `torch.save`, on the CPU. CheckpointError as `load_torch`, or when it is none."""
    return mapping(load_torch(file), file)


def mapping(value: object, file: Path, key: str = "") -> dict[Any, Any]:
    """`value`, which `file` holds (under `key`). CheckpointError when it is no mapping."""
    if isinstance(value, dict):
        return value
    what = f"{key} is missing" if value is None else f"{key or 'the whole'} is a {type(value).__name__}"
    raise CheckpointError(f"{file}: {what} where a mapping is needed; copy the checkpoint again")


def as_number(value: object) -> float | None:
    """A number, or a tensor of one, as a float; None for anything else."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    return None


class _MetadataUnpickler(pickle.Unpickler):
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
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as handle:
                found = cast(metadata.Metadata, _MetadataUnpickler(handle).load())
        except FileNotFoundError:
            raise CheckpointError(
                f"{file}: is missing, so the checkpoint was never completed; use an older one"
            ) from None
        except (OSError, EOFError, AttributeError, ValueError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); copy the checkpoint again") from error
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        return found


def distributed_keys(folder: Path) -> list[str]:
    """Names of the tensors in a distributed checkpoint (DCP).

    Raises:
        CheckpointError: a file with a part of a tensor is missing or cut short; all of them are named.
    """
    found = _Reader(folder).read_metadata()
    needed: dict[str, int] = {}
    for place in (found.storage_data or {}).values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    problems = []
    for name, size in sorted(needed.items()):
        file = folder / name
        if not file.is_file():
            problems.append(
                f"{file}: is missing ({len(needed)} files belong together); copy the checkpoint again"
            )
        elif file.stat().st_size < size:
            problems.append(f"{file}: is cut short ({file.stat().st_size} of {size} bytes); copy it again")
    if problems:
        raise CheckpointError("\n".join(problems))
    stored = found.state_dict_metadata
    return [name for name, kind in stored.items() if isinstance(kind, TensorStorageMetadata)]


def load_distributed(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Whole tensors of a distributed checkpoint, put together from every rank's part, without a process group."""
    reader = _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for name in names:
        kind = stored[name]
        assert isinstance(kind, TensorStorageMetadata), name
        state[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    if state:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="torch.distributed is disabled"
                )  # which is what is meant
                state_dict_loader.load(state, storage_reader=reader, no_dist=True)
        except (*_DAMAGED, CheckpointException) as error:  # the latter is no Exception
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{folder}: cannot be read ({reason}); copy the checkpoint again"
            ) from error
    return state
