"""Micro-batches handed over in order, decoded ahead in data workers."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from launch.errors import RunError, SamestepError
from trainer import WATCHDOG
from trainer.data.micro_batches import Batches, PackedBatch
from trainer.data.worker_transport import HandedOver, Pickled, describe_loss, end_with_lost_batches

BATCH_PATIENCE_S = 600
"""For one micro-batch of data workers that are alive: a disk that is out of reach, say."""


def data_workers(processes_per_node: int) -> int:
    """Return the data workers of one rank: its share of the cores this process may use, at most 8; 0 when none is to
    spare.
    """
    cores = len(os.sched_getaffinity(0))
    return max(0, min(8, cores // processes_per_node - 1))


@dataclass
class DataWait:
    """Seconds that this rank has waited for micro-batches, over all loaders."""

    seconds: float = 0.0


DATA_WAIT = DataWait()


class _Numbers(torch.utils.data.Sampler[int]):
    def __init__(self, numbers: range) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class Loader:
    """Micro-batches in the given order, decoded ahead in `workers` processes (0: in this one).

    Its length is that of the whole run, `total`: `Trainer` derives the steps of its one "epoch" from it, also when
    the run is resumed in the middle. `ahead`: micro-batches that each worker has ready or in work. `by_pipe`: they
    come without shared memory.
    """

    def __init__(
        self,
        batches: Batches,
        numbers: range,
        *,
        total: int,
        workers: int,
        pin_memory: bool,
        ahead: int = 4,
        by_pipe: bool = False,
    ) -> None:
        self._total = total
        if workers:
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)
        self._loader: DataLoader[Any] = DataLoader(
            HandedOver(batches, by_pipe) if workers else batches,
            batch_size=None,
            sampler=_Numbers(numbers),
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            pin_memory=pin_memory,
            timeout=BATCH_PATIENCE_S if workers else 0,
            worker_init_fn=_start_worker,
        )
        self._reading: Generator[PackedBatch, None, None] | None = None
        self._begun = False
        self._ready: PackedBatch | Exception | None = None  # read ahead

    def __len__(self) -> int:
        return self._total

    def begin(self) -> Loader:
        """Let the workers start now: what they have ready when the batches are asked for is not waited for."""
        self._reading, self._begun, self._ready = _read_all(iter(self._loader)), True, None
        return self

    def __iter__(self) -> Iterator[PackedBatch]:
        if not self._begun:
            self.begin()
        self._begun = False
        return self._hand_out()

    def _hand_out(self) -> Iterator[PackedBatch]:
        while self._reading is not None:
            ready, self._ready = self._ready, None
            if isinstance(ready, Exception):
                raise ready
            if ready is None:
                try:
                    ready = next(self._reading)
                except StopIteration:
                    return
            yield ready

    def read_ahead(self, prepare: Callable[[PackedBatch], PackedBatch]) -> None:
        """Take the next micro-batch before it is asked for, and `prepare` it; the iteration hands out the result.

        An error is raised there too: whoever reads ahead is busy with something else. After the last micro-batch, and
        where one is ready, nothing happens.
        """
        if self._reading is None or self._ready is not None:
            return
        try:
            self._ready = prepare(next(self._reading))
        except StopIteration:
            return
        except Exception as error:
            self._ready = error

    def change_ready(self, change: Callable[[PackedBatch], PackedBatch]) -> None:
        """Let `change` replace the micro-batch that was read ahead, if there is one."""
        if self._ready is not None and not isinstance(self._ready, Exception):
            self._ready = change(self._ready)

    def close(self) -> None:
        """End the data workers, of a reading that somebody gave up in the middle.

        The traceback of an error holds it, in a cycle. Python collects that only after the queues to the workers have
        been closed, whose callbacks come before `__del__`: PyTorch 2.14 then waits 5 s, twice, for workers that can no
        longer be told to end.
        """
        if self._reading is not None:
            self._reading.close()
            # Python 3.12 leaves a generator that was not begun all it holds (cpython#142766).
            self._reading, self._begun, self._ready = None, False, None


def _read_all(batches: Iterator[Any]) -> Generator[PackedBatch, None, None]:
    """What the workers hand over. The only reference to PyTorch's iterator is here: it ends with the generator.

    Raises:
        RunError: a worker died, or hands nothing over any more.
    """
    try:
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if (lost := lost_worker(error)) is None:
                    raise
                ignore_dead_workers()
                raise lost from None
            if isinstance(batch, Pickled):
                batch = batch.unpickle()
            if isinstance(batch, SamestepError):
                raise batch
            DATA_WAIT.seconds += time.perf_counter() - began
            WATCHDOG.heartbeat()
            yield batch
    finally:
        del batches  # or the traceback of an error would hold it


def lost_worker(error: Exception) -> RunError | None:
    """Say in words what PyTorch raises about its data workers; None for what a batch raised in one of them.

    Its handler of SIGCHLD raises it wherever the rank is, in the middle of a step too (torch 2.14,
    `torch/utils/data/_utils/signal_handling.py`).
    """
    named = str(error).startswith(("DataLoader", "Pin memory", "Too many open"))
    return RunError(describe_loss(error)) if named or not isinstance(error, RuntimeError) else None


def ignore_dead_workers() -> None:
    """Take away PyTorch's handler of SIGCHLD, once the reading ends for good.

    It would raise again for the next worker that ends, wherever the main thread is by then: while the error is
    printed, or in the functions that run at the end of the process.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the processes are the parallelism
    gc.enable()  # the training calls it by itself; what it froze stays shared with this process
    end_with_lost_batches()
    # A stop is agreed by the ranks, which need their data until then. A rank that dies without a word is noticed
    # (PyTorch's watchdog looks for the parent every 5 s); one that ends calls `_end_workers`.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At the end of the process: multiprocessing would send the SIGTERM that workers ignore, and wait for ever.

    Registered after multiprocessing's own end, so it runs before it.
    """
    ignore_dead_workers()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
