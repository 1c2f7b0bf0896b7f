"""Reads numbers that the GPU computes, without leaving it with nothing to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def read_numbers(values: Tensor, meanwhile: Callable[[], None]) -> list[float]:
    """Return a tensor's numbers [n]. `meanwhile` is called before the host waits for them.

    What it gives the GPU comes after them, and is not waited for.
    """
    on_host = values.to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if values.is_cuda else None
    if copied:
        copied.record()
    meanwhile()
    if copied:
        copied.synchronize()
    numbers: list[float] = on_host.tolist()
    return numbers
