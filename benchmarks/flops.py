"""What a GPU can do a second; what a step cannot do without is counted in `trainer.loop.step_figures`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np


def matrix_product_ceiling(size: int = 8192, repeats: int = 60, heated_s: float = 0.0) -> float | None:
    """Operations a second of bf16 matrix products of random numbers on GPU 0: the median; None without a GPU.

    `heated_s`: seconds of such products before those that are timed. A card that reaches its power limit lowers its
    clock after a few tenths of a second, which a short measurement does not see and a training step does.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    began = time.perf_counter()
    while time.perf_counter() - began < heated_s:
        for _ in range(20):
            torch.mm(left, right, out=out)
        torch.cuda.synchronize()
    marks: list[tuple[Any, Any]] = []
    for place in range(repeats + 10):  # the first ten warm up
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.mm(left, right, out=out)
        end.record()
        if place >= 10:
            marks.append((begin, end))
    torch.cuda.synchronize()
    seconds = float(np.median([begin.elapsed_time(end) for begin, end in marks])) / 1e3
    return 2 * size**3 / seconds
