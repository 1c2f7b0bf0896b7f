"""Reads the tensors of a base ahead of their quantization.

transformers 5.23 reads a model that it quantizes while loading one tensor after another, without its threads: these
would fill the GPU with whole tensors faster than it quantizes them (`convert_and_load_state_dict_in_model`). So the
GPU waits for the copy, and the copy for the GPU. Here a few threads read, and the number of tensors ahead is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import core_model_loading

THREADS = 4
AHEAD = 6
"""Tensors that are read or wait to be taken; a decoder layer's largest have 0.14 GB in a 7B model."""

_Read = Callable[[], Tensor]


@contextmanager
def tensors_ahead() -> Iterator[None]:
    """Inside, transformers reads ahead what it would read at the moment when it is needed. One model at a time."""
    deferred = core_model_loading.spawn_materialize
    with ThreadPoolExecutor(THREADS, "tensors-ahead") as pool:
        queue = _Queue(pool)

        def spawn(thread_pool: ThreadPoolExecutor | None, *arguments: Any, **options: Any) -> Any:
            read = deferred(thread_pool, *arguments, **options)
            return (
                read if isinstance(read, Future) else queue.put(read)
            )  # with a pool of its own it reads ahead

        core_model_loading.spawn_materialize = spawn
        try:
            yield
        finally:
            core_model_loading.spawn_materialize = deferred
            pool.shutdown(cancel_futures=True)


class _Queue:
    """Reads in the order in which they are put, which is that in which they are taken."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._reads: list[_Read] = []
        self._begun: dict[int, Future[Tensor]] = {}
        self._next = 0

    def put(self, read: _Read) -> _Read:
        """Return what waits for this read, and begins some of those behind it."""
        number = len(self._reads)
        self._reads.append(read)
        return lambda: self._take(number)

    def _take(self, number: int) -> Tensor:
        while self._next < min(number + AHEAD, len(self._reads)):
            self._begun[self._next] = self._pool.submit(self._reads[self._next])
            self._next += 1
        return self._begun.pop(number).result()
