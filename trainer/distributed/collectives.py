"""Collectives of Python values, and errors that all ranks raise together instead of waiting for one that failed."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from launch.atomic_files import place_of
from launch.errors import ConfigError, GpuMemoryError, RunError, SamestepError
from launch.untrusted_files import UntrustedFileError
from trainer.logging_setup import print_error

T = TypeVar("T")
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room; the same command goes on"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "give permission to write; the same command goes on"
    ),
}


def run_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank and return its result; raise on every rank when it failed on any.

    A collective: all ranks call it at the same point. The message names the rank when there are several.
    `group`: of all ranks, for a thread beside the one that trains.

    Raises:
        SamestepError: the failing rank's error (of its class, with its exit status).
    """
    error: SamestepError | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as raised:
        error = to_user_error(raised)
    failed = _first_failure(error, group)
    if failed is not None:
        failed.agreed = True
        raise failed
    return result  # type: ignore[return-value]


def to_user_error(raised: Exception) -> SamestepError:
    """Turn any exception into the error that a user reads."""
    if isinstance(raised, UntrustedFileError):  # which others could not make of its words
        return ConfigError(raised.problems)
    if isinstance(raised, SamestepError):
        return raised
    if isinstance(raised, torch.OutOfMemoryError):
        return out_of_memory(raised)
    if isinstance(raised, OSError):
        remedy = _REMEDIES.get(raised.errno or 0, "see that the disk is there; the same command goes on")
        return RunError(f"{place_of(raised, 'a file')}; {remedy}")
    if isinstance(raised, SafetensorError):  # how safetensors reports a full disk
        return RunError(
            f"a safetensors file: {raised}; make room or give permission; the same command goes on"
        )
    # A bug: the other ranks must hear of it too, or they wait for ever.
    logging.getLogger("trainer").error("unexpected", exc_info=raised)
    return RunError(f"{type(raised).__name__}: {raised} (see the traceback above); please report it")


def out_of_memory(raised: torch.OutOfMemoryError) -> GpuMemoryError:
    """Turn PyTorch's error of a full GPU into one for the user."""
    amount = re.search(r"Tried to allocate ([\d.]+ \w+)", str(raised))
    shortfall = f" ({amount[1]} more wanted)" if amount else ""
    return GpuMemoryError(
        f"GPU: out of memory{shortfall}; the same command goes on, with less where batch.micro_batch_tokens, "
        "training.gradient_checkpointing or model.resident_weights is auto; `samestep plan` shows what fits"
    )


def _first_failure(error: SamestepError | None, group: dist.ProcessGroup | None) -> SamestepError | None:
    if not dist.is_initialized():
        return error
    gathered = gather_objects((type(error), str(error)) if error else None, group)
    for rank, failure in enumerate(gathered):
        if failure is not None:
            kind, message = failure
            return kind(message if rank == 0 else f"rank {rank}: {message}")
    return None


def run_on_main(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 alone; every rank waits for it and fails with it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    run_on_all_ranks(action if rank == 0 else lambda: None)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of every rank, by rank (picklable)."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def broadcast_from_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and give every rank its result (picklable); all fail with it."""
    box: list[T | None] = [None]

    def run() -> None:
        box[0] = action()

    run_on_main(run)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def lost_contact(error: RuntimeError) -> RunError | None:
    """Return the user's error for what a collective raises when another rank is gone; None for any other error.

    gloo raises a plain RuntimeError with its own name in it, NCCL a `DistBackendError` (torch 2.14).
    """
    text = str(error)
    if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in text):
        return None
    lines = text.strip().splitlines() or [type(error).__name__]
    return RunError(
        f"rank {dist.get_rank()}: lost contact with another rank ({lines[0][-160:]}); it died or its machine did: see "
        "its words; the same command goes on from the newest checkpoint"
    )


def report_error(error: SamestepError) -> int:
    """Say what went wrong: rank 0 for all when all know it, else the rank that it happened to. Returns the status."""
    if not dist.is_initialized():  # before the ranks know each other, those of a node find the same
        return print_error(error) if os.environ.get("LOCAL_RANK", "0") == "0" else error.exit_status
    if not error.agreed:
        return print_error(error)  # the others are waiting somewhere: the launcher ends them
    if dist.get_rank() == 0:
        print_error(error)
    destroy_process_group()
    return error.exit_status


def destroy_process_group() -> None:
    """Leave the process group, all ranks together: the launcher ends the others as soon as one has failed."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End this process of several, all of Python done and nothing of C++ begun.

    Now and then gloo's groups, which DDP still holds, abort in the interpreter's teardown ("terminate called without an
    active exception", pytorch#190489, #179291; torch 2.14), and the launcher calls a run failed that has ended well.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does first: ends pools, joins threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
