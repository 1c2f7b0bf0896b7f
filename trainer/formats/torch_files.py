"""Files that torch pickled, read without running what is in them: tensors, numbers, texts, and nothing else.

`torch.load(weights_only=True)` refuses classes. DeepSpeed 0.19 puts four of its own into its files; what they hold
is not needed, so harmless stand-ins take their place and DeepSpeed's code is neither imported nor run.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from launch.errors import CheckpointError
from launch.untrusted_files import UntrustedFileError, open_plain, plain_size, printable
from trainer.formats.validated import refuse_more_than_memory

_DIRECTORY_BYTES = 2**28  # of a zip: a million members


class _StandIn:
    """In the place of an object whose content nobody needs."""


_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]

# What torch 2.14's reader of pickles raises over flipped and missing bytes.
DAMAGED = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, AssertionError, AttributeError, TypeError, struct.error,
    ArithmeticError, MemoryError, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def load_torch(file: Path) -> Any:
    """Return the content of a file of `torch.save`, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, says more than it holds, or holds objects that only running code
            could make.
    """
    try:
        with open_plain(file) as opened:
            # DeepSpeed's own writer makes no archive; of one, only what is looked at is read.
            mapped = zipfile.is_zipfile(opened)
            if mapped:
                refuse_expanding(opened, plain_size(file))
        if not mapped:
            refuse_more_than_memory(plain_size(file), file)
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        for tensor in _tensors_in(content):
            _refuse_claim(tensor)
        return content
    except FileNotFoundError:
        raise CheckpointError(
            f"{printable(str(file))}: is missing; copy the checkpoint again, with all its files"
        ) from None
    except DAMAGED as error:
        raise CheckpointError(
            f"{printable(str(file))}: cannot be read ({why_damaged(error)}); copy the checkpoint again"
        ) from error


def why_damaged(error: BaseException) -> str:
    """Return the words of one of `DAMAGED`, without the file's name."""
    if isinstance(error, UntrustedFileError):
        return error.reason
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__


class _Bounded:
    """A file as zipfile reads it: nothing larger than the directory of a million members at once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_BYTES:
            raise ValueError(f"its directory is said to have {size:,} bytes")
        return self._file.read(_DIRECTORY_BYTES if size < 0 else size)


def refuse_expanding(file: IO[bytes], size: int) -> None:
    """ValueError when a zip of `size` bytes says that it holds more than that: torch stores and does not deflate."""
    with zipfile.ZipFile(cast(IO[bytes], _Bounded(file))) as archive:
        members = archive.infolist()
    whole = sum(member.file_size for member in members)
    deflated = any(
        member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size
        for member in members
    )
    if deflated or whole > size:
        raise ValueError(f"its members would expand to {whole:,} bytes, it has {size:,}")


def _refuse_claim(tensor: Tensor) -> None:
    """ValueError for a tensor of more numbers than are stored, as one with strides of 0 can be."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"it holds a tensor of another kind ({tensor.layout}, {tensor.device})")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise ValueError(f"it holds a tensor of {claimed:,} bytes, of which {stored:,} are stored")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a structure of mappings and lists; each is visited once, however often it occurs."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one


def load_mapping(file: Path) -> dict[Any, Any]:
    """Return the mapping in a file of `torch.save`, on the CPU. CheckpointError as `load_torch`, or when it is none."""
    return mapping(load_torch(file), file)


def mapping(value: object, file: Path, key: str = "") -> dict[Any, Any]:
    """`value`, which `file` holds (under `key`). CheckpointError when it is no mapping."""
    if isinstance(value, dict):
        return value
    what = f"{key} is missing" if value is None else f"{key or 'the whole'} is a {type(value).__name__}"
    raise CheckpointError(
        f"{printable(str(file))}: {what} where a mapping is needed; copy the checkpoint again"
    )


def as_number(value: object) -> float | None:
    """Return a number, or a tensor of one, as a float; None for anything else."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    return None
