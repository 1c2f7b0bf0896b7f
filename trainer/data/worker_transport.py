"""How a micro-batch comes from a data worker to its rank: in shared memory, or through a pipe where that is small.

PyTorch puts tensors into shared memory in a thread of the worker's queue. Where that fails, the thread prints a
traceback and drops the batch, the worker lives, and the rank waits for ever (torch 2.14, Python 3.11 to 3.13). Here the
worker itself puts them there, sends a batch that finds no room through the queue's pipe, and ends with whatever its
queue drops, which the rank notices.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from multiprocessing import queues
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from launch.hardware import SHARED_MEMORY

LEAST_BYTES = 2**20
"""Of shared memory for the semaphores of the queues alone; without it there are no data workers."""
MARGIN = 2
"""The readings of a training and of an evaluation are there at once."""


@dataclass(frozen=True)
class Way:
    """How many data workers a rank has, and whether they use the pipe. `notice`: why not as asked for, or empty."""

    workers: int
    by_pipe: bool = False
    notice: str = ""


def free_shared_memory() -> tuple[int, int]:
    """Return the bytes of shared memory that are free now, and of all of it."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0, 0
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def choose_way(workers: int, ahead: int, batch_bytes: int, ranks: int) -> Way:
    """Choose for `ranks` of this machine with so many workers, each `ahead` micro-batches of `batch_bytes` on the
    average.
    """
    free, total = free_shared_memory()
    needed = MARGIN * ranks * workers * ahead * batch_bytes
    if workers == 0 or needed <= free:
        return Way(workers)
    reason = (
        f"{SHARED_MEMORY}: {_mb(free)} of {_mb(total)} free, micro-batches read ahead may take {_mb(needed)}"
    )
    if free < LEAST_BYTES:
        return Way(0, notice=f"{reason}; each rank reads its data itself")
    return Way(
        workers, by_pipe=True, notice=f"{reason}; they come through pipes, which is slower for large images"
    )


def describe_loss(error: Exception) -> str:
    """Say why data workers hand nothing over any more, and what to do."""
    free, total = free_shared_memory()
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"data workers: a micro-batch is lost ({first}); {SHARED_MEMORY} has {_mb(free)} of {_mb(total)} free; see "
        "the words above; make room there (Docker: --shm-size), or in memory where the kernel killed a worker, or set "
        "training.dataloader_num_workers=0; the same command goes on"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


class HandedOver(Dataset[Any]):
    """Batches as they leave a data worker: their tensors in shared memory, or all of them `Pickled`."""

    def __init__(self, batches: Dataset[Any], by_pipe: bool) -> None:
        self._batches, self._by_pipe = batches, by_pipe

    def __getitem__(self, number: int) -> Any:
        batch = self._batches[number]
        if not self._by_pipe:
            try:
                _share(batch)
                return batch
            except (RuntimeError, OSError) as error:
                self._by_pipe = True  # here, in this worker
                first = str(error).splitlines()[0]
                _say(f"{SHARED_MEMORY}: {first}; a data worker goes on through its pipe")
        return Pickled(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL))


@dataclass(frozen=True)
class Pickled:
    """A batch as bytes, which need no shared memory."""

    data: bytes

    def unpickle(self) -> Any:
        """Return the batch."""
        return pickle.loads(self.data)

    def pin_memory(self) -> Any:
        """Return the batch in pinned memory; called by PyTorch's thread that pins."""
        return pin_memory(self.unpickle())


def _share(value: Any) -> None:
    """Move all tensors in nested dicts to shared memory."""
    if isinstance(value, Tensor):
        if value.numel():
            value.share_memory_()
    elif isinstance(value, dict):
        for inner in value.values():
            _share(inner)


def end_with_lost_batches() -> None:
    """End a data worker whose queue cannot send a batch, and let the rank hear of that; called in the worker."""

    def end(error: Exception, _: object) -> None:
        _say(f"data worker: cannot hand over a micro-batch ({type(error).__name__}: {error})")
        os._exit(1)

    queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]
