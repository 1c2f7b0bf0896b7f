"""All ranks fail together: what goes wrong on one rank is told to all before any of them waits for it for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from launch.errors import RunError, SamestepError

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; raise on every rank when it failed on any.

    A collective: all ranks call it at the same point. The message names the rank when there are several.

    Raises:
        SamestepError: the failing rank's error (of its class, with its exit status).
    """
    error: SamestepError | None = None
    result: T | None = None
    try:
        result = action()
    except SamestepError as raised:
        error = raised
    except OSError as raised:
        error = RunError(
            f"{raised.filename or 'file'}: {raised.strerror or raised}; make room or give permission"
        )
    failed = _first_failure(error)
    if failed is not None:
        failed.agreed = True
        raise failed
    return result  # type: ignore[return-value]


def _first_failure(error: SamestepError | None) -> SamestepError | None:
    if not dist.is_initialized():
        return error
    gathered: list[tuple[type[SamestepError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (type(error), str(error)) if error else None)
    for rank, told in enumerate(gathered):
        if told is not None:
            kind, message = told
            return kind(message if rank == 0 else f"rank {rank}: {message}")
    return None


def on_rank_0(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 alone; every rank waits for it and fails with it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    together(action if rank == 0 else lambda: None)
