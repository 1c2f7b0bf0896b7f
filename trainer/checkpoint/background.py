"""Writing a checkpoint beside the training: a disk that is slow to confirm does not stop the steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Publisher:
    """Writes one checkpoint at a time in a thread. `failed` is told, from that thread, what went wrong."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin a checkpoint; the caller has waited for the one before."""
        self._pending = self._pool.submit(self._guarded, write)

    def wait(self) -> None:
        """Until nothing is being written: before the next save, before processes are forked, at the end."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._failed(error)
