"""Freshly computed features go to the cache beside the training, which never waits for them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.vision_cache.file import Features
from trainer.vision_cache.store import FeatureCache, FullError

QUEUED = 4
"""Micro-batches that may wait to be written; a further one is dropped."""

logger = logging.getLogger("trainer")


@dataclass(frozen=True)
class _Computed:
    """Features of some images on their way: `values` [V, hidden] on the CPU, complete once `copied` has happened."""

    images: Sequence[str]
    grids: Sequence[tuple[int, int, int]]
    values: Tensor
    copied: torch.cuda.Event | None


def open_writer(cache: FeatureCache | None) -> FeatureWriter | None:
    """Return the writer of a run's cache, which warns once when it keeps no more."""
    return FeatureWriter(cache, logger.warning) if cache else None


class FeatureWriter:
    """Writes what is computed in a thread; `say` hears from it, once, why no more is kept.

    `kept`, `dropped`: images so far that were written, or not for want of time. `needed`, `computed`: images of this
    rank's micro-batches so far, and those of them that the tower ran for.
    """

    def __init__(self, cache: FeatureCache, say: Callable[[str], None]) -> None:
        self._cache, self._say = cache, say
        self._queue: queue.Queue[_Computed | None] = queue.Queue(QUEUED)
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._given_up = False
        self.kept = self.dropped = self.needed = self.computed = 0

    def keep(self, images: Sequence[str], grids: Sequence[tuple[int, int, int]], features: Tensor) -> None:
        """Take the features [V, hidden] of a micro-batch's images; returns at once, drops them when it is behind."""
        if self._given_up:
            return
        if self._queue.full():
            self.dropped += len(images)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="features", daemon=True)
            self._thread.start()
        self._queue.put_nowait(_Computed(images, grids, *self._copy(features)))

    def count(self, needed: int, computed: int) -> None:
        """Count the images of a micro-batch, and those among them that the tower runs for."""
        self.needed += needed
        self.computed += computed

    def summary(self) -> str | None:
        """Describe for the log what the cache was good for, once closed; None when nothing was computed."""
        if not self.needed:
            return None
        dropped = f", {self.dropped} dropped for want of time" if self.dropped else ""
        return (
            f"vision features: {self.needed - self.computed} of {self.needed} images of rank 0 were there; "
            f"{self.kept} added{dropped}"
        )

    def wait(self) -> None:
        """Until nothing is being written: before processes are forked, at the end."""
        self._queue.join()

    def close(self) -> None:
        """Write what waits, and end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _copy(self, features: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """To pinned memory on a stream of its own: neither the host nor the training's stream waits."""
        if not features.is_cuda:
            return features, None
        stream = self._stream = self._stream or torch.cuda.Stream(features.device)
        stream.wait_stream(torch.cuda.current_stream(features.device))
        with torch.cuda.stream(stream):
            values = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            values.copy_(features, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # or the thread would wait busily
            copied.record(stream)
        features.record_stream(stream)  # its memory is not given away before the copy is done
        return values, copied

    def _work(self) -> None:
        counted = False
        while (computed := self._queue.get()) is not None:
            try:
                if not self._given_up:
                    if not counted:
                        self._cache.recount()
                        counted = True
                    self._write(computed)
            except FullError as full:
                self._give_up(f"{self._cache.root} is full: {full}")
            except OSError as error:
                self._give_up(f"{self._cache.folder} cannot be written ({error.strerror or error})")
            except Exception as error:  # a bug here must not stop the training
                logger.error("unexpected", exc_info=error)
                self._give_up(f"{type(error).__name__} (see the traceback above); please report it")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, computed: _Computed) -> None:
        if computed.copied is not None:
            computed.copied.synchronize()
        lengths = [
            time * height * width // self._cache.kind.merge**2 for time, height, width in computed.grids
        ]
        parts = computed.values.split(lengths)
        for image, grid, values in zip(computed.images, computed.grids, parts, strict=True):
            self.kept += self._cache.write(image, Features(values, grid))

    def _give_up(self, why: str) -> None:
        """Once: a bound that is reached stays reached."""
        self._given_up = True
        self._say(f"vision features: no more are kept; {why}")
