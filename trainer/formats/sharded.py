"""Sharded checkpoints: every rank writes its own part of the trained state, into `shards/`.

single, ddp and fsdp: each rank has all of it, so it is partitioned, and torch writes the parts (distributed checkpoint,
DCP). zero2 and zero3: the files that DeepSpeed makes of its shards.
`trainer.formats.detect` reads both, of any number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from launch.errors import RunError, SamestepError
from trainer.distributed.collectives import to_user_error
from trainer.formats.dcp import load_distributed
from trainer.formats.forms import OPTIMIZER_PREFIX
from trainer.formats.portable import TrainedState
from trainer.formats.torch_files import load_torch


def partition_by_size(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Partition names over the ranks so that their sizes balance: the largest first, each to who has least."""
    parts: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        parts[rank].append(name)
        loads[rank] += sizes[name]
    return parts


@dataclass(frozen=True)
class DcpRankState:
    """The share of one rank in a state that all ranks have: copies of it.

    DCP would partition whole tensors as well, by size, but only after every rank had copied all of them.
    """

    state: TrainedState

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> list[str]:
        """Write it into a folder that is there; the names of its files. A collective of `group`, which raises on all.

        Raises:
            SamestepError: a rank could not write, or its files read back are not what was meant.
        """
        # Said once for each save of a single process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        optimizer_state = {
            f"{OPTIMIZER_PREFIX}{name}": tensor for name, tensor in self.state.optimizer.items()
        }
        tensors = {**self.state.adapter, **optimizer_state}
        single, rank = not dist.is_initialized(), dist.get_rank() if dist.is_initialized() else 0
        # 0: nothing is left to be copied from a GPU, where torch would wait in this thread for the first one.
        writer = _Writer(folder, per_thread_copy_ahead=0)
        try:
            state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=single)
        except CheckpointException as error:
            raise _first_failure(error) from None
        _compare(folder, tensors.values(), load_distributed(folder, list(tensors)).values())
        return sorted(file.name for file in folder.glob(f"__{rank}_*.distcp"))


class _Writer(FileSystemWriter):
    """torch's writer, whose errors say which file the disk refused."""

    def write_data(self, *args: Any) -> Future[Any]:
        try:
            return super().write_data(*args)
        except Exception as error:
            raise _refused(error, Path(self.path)) from None

    def finish(self, metadata: Metadata, results: Any) -> None:
        try:
            super().finish(metadata, results)
        except Exception as error:
            raise _refused(error, Path(self.path)) from None


def _first_failure(error: CheckpointException) -> SamestepError:
    """Return what every rank was told of the ranks that failed, as `run_on_all_ranks` would raise it."""
    rank, (cause, _) = min(error.failures.items())
    words = to_user_error(cause if isinstance(cause, Exception) else RuntimeError(repr(cause)))
    return words if rank == 0 else type(words)(f"rank {rank}: {words}")


@dataclass(frozen=True)
class ZeroRankState:
    """What DeepSpeed saves on one rank: file below the folder -> its content, copied. A text is a text file."""

    files: dict[str, Any]

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> list[str]:
        """Write it into a folder that is there; the names of its files. No collective.

        Raises:
            SamestepError: this rank could not write, or its files read back are not what was meant.
        """
        for name, content in self.files.items():
            file = folder / name
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, str):
                    file.write_text(content)
                    continue
                with file.open("wb") as handle:
                    torch.save(content, handle)
            except Exception as error:
                raise _refused(error, file) from None
            _compare(file, tensors_in(content), tensors_in(load_torch(file)))
        return list(self.files)


class InMemoryCheckpointEngine:
    """In the place of DeepSpeed's checkpoint engine: keeps copies of what it is given to write, by file name."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        self.files[Path(path).as_posix()] = copied(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: who writes the files makes their folders."""

    def create(self, info: object) -> None:
        """Nothing to begin."""

    def commit(self, info: object) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False


def copied(value: Any) -> Any:
    """Return a structure of dictionaries and lists with its tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in a structure of dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def _compare(where: Path, meant: Any, written: Any) -> None:
    pairs = list(zip(meant, written, strict=True))
    if wrong := sum(not torch.equal(one, other) for one, other in pairs):
        raise RunError(
            f"{where}: {wrong} of {len(pairs)} tensors were not written as they are; the disk is damaged"
        )


def _refused(error: Exception, place: Path) -> SamestepError:
    """Return what the disk said. torch's writer of archives covers that with an error of its own (torch 2.14)."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    if cause is None:
        return to_user_error(error)
    return to_user_error(OSError(cause.errno, cause.strerror, cause.filename or str(place)))
