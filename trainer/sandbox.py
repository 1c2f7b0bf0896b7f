"""Work that a file of somebody else's asks for, tried where the system ends it: a template to render, a pattern."""

from __future__ import annotations

import gc
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil

SECONDS = 2
"""Of processor time: what is tried takes milliseconds."""
MEMORY = 2**30
"""Bytes, beside what the process has."""
_PATIENCE = 20
"""The longest by the clock, in multiples of the processor time: a machine may be busy."""


def trial(work: Callable[[], object], seconds: int = SECONDS, memory: int = MEMORY) -> str | None:
    """Do `work` in a forked child with limits, for nothing but to learn whether it ends.

    Neither a regular expression nor a big number of Python can be interrupted from within, nor does jinja2's sandbox
    bound nested loops. What ended here ends in this process too, when it is given the same.

    Returns:
        What was wrong with it in words (the limit that it met, or what it raised); None when it ended well.
    """
    context = multiprocessing.get_context("fork")
    receiving, telling = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(work, telling, seconds, memory), daemon=True)
    child.start()
    telling.close()
    with receiving:
        try:
            answer: str | None = (
                receiving.recv() if receiving.poll(seconds * _PATIENCE) else _too_long(seconds)
            )
        except EOFError:  # ended by the system
            answer = _too_long(seconds)
    child.kill()
    child.join()
    child.close()
    return answer


def _too_long(seconds: int) -> str:
    return f"it takes more than {seconds} s"


def _limited(work: Callable[[], object], telling: Connection, seconds: int, memory: int) -> None:
    gc.disable()  # what the parent holds on a GPU is not this child's to free
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    size, most = psutil.Process().memory_info().vms + memory, resource.getrlimit(resource.RLIMIT_AS)[1]
    # A limit that the machine has already (`ulimit -v`) cannot be raised, and is stricter.
    if most == resource.RLIM_INFINITY or size < most:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        work()
        telling.send(None)
    except MemoryError:
        telling.send(f"it needs more than {memory // 2**20} MiB of memory")
    except Exception as error:  # whatever it raises is the answer
        telling.send(f"{type(error).__name__}: {str(error)[:300]}")
