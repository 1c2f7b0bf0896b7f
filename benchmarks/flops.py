"""Floating-point operations that a training step of Qwen2-VL-7B cannot do without, and what a GPU can do a second.

Counted: the language model forward and backward to the activations (its weights are frozen, so no gradients of
them), attention over the causal half, the output head at scored tokens, the vision tower forward unless its features
are cached. Not counted: recomputation, LoRA (0.04 % of the weights), padding, tokens scored without need. A multiply
and an add are two operations. The shape: 28 layers of hidden 3584 and 6.525e9 linear weights, a vocabulary of 152,064;
a tower of 32 blocks, 1280 wide, 1.26e9 operations a patch in its linear layers and the merger.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LINEAR_WEIGHTS = 6.525e9
LAYERS, HIDDEN, VOCABULARY = 28, 3584, 152_064
VISION_PER_PATCH = 1.26e9
VISION_BLOCKS, VISION_HIDDEN = 32, 1280
PATCHES_PER_VISUAL_TOKEN = 4


def sample_flops(
    text_tokens: ArrayLike, visual_tokens: ArrayLike, target_tokens: ArrayLike, *, vision: bool
) -> NDArray[np.float64]:
    """Of training on each sample, [n]. `vision`: the tower runs, its features are not cached."""
    text, visual, targets = (
        np.asarray(counts, dtype=np.float64) for counts in (text_tokens, visual_tokens, target_tokens)
    )
    tokens, patches = text + visual, visual * PATCHES_PER_VISUAL_TOKEN
    linear = 2 * (2 * LINEAR_WEIGHTS) * tokens  # forward, and as much again for the activations' gradients
    attention = 3 * (
        LAYERS * 2 * HIDDEN * tokens**2
    )  # causal: half of 4 T^2 hidden a layer; backward twice it
    head = 2 * (2 * HIDDEN * VOCABULARY) * targets
    tower = VISION_PER_PATCH * patches + VISION_BLOCKS * 4 * VISION_HIDDEN * patches**2
    return np.asarray(linear + attention + head + (tower if vision else 0.0))


def matrix_product_ceiling(size: int = 8192, repeats: int = 60) -> float | None:
    """Operations a second of bf16 matrix products of random numbers on GPU 0: the median; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
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
