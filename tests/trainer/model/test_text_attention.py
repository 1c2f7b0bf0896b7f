"""The language model's attention kernels against the loop over samples: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from trainer.data.packing import cumulative
from trainer.model import text_attention_kernel as kernel
from trainer.model.attention import Segments, attend
from trainer.model.text_attention import attend_causally

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TILES = {} if GPU else {"FORWARD": (16, 8), "OF_KEYS": (8, 16), "OF_QUERIES": (16, 8)}
"""The interpreter is slow: tiles that short samples fill."""


@pytest.mark.parametrize("key_heads", [1, 2, 4] if GPU else [2])
def test_attention_and_its_gradients_are_those_of_the_loop(
    key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples shorter and longer than a tile, whole multiples of tiles and not; key heads that are shared and not."""
    for name, (rows, columns) in TILES.items():
        monkeypatch.setitem(getattr(kernel, name), "M", rows)
        monkeypatch.setitem(getattr(kernel, name), "N", columns)
    lengths = (137, 256, 1, 400, 64) if GPU else (21, 32, 1)
    segments = Segments(cumulative(lengths).to(DEVICE), lengths)
    width = 128 if GPU else 16
    dtype = torch.bfloat16 if GPU else torch.float32

    def random(heads: int, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(sum(lengths), heads, width, generator=draw).to(DEVICE, dtype)

    leaves = [random(4, 0), random(key_heads, 1), random(key_heads, 2)]
    back, scale = random(4, 3), width**-0.5

    def run(mine: bool) -> list[torch.Tensor]:
        given = [(leaf if mine else leaf.float()).clone().requires_grad_() for leaf in leaves]
        if mine:
            output = attend_causally(*given, segments.cu_seqlens, lengths, scale)
        else:
            output = attend(*given, segments, True, scale)
        return [output.detach(), *torch.autograd.grad(output, given, back.to(output.dtype))]

    for found, expected in zip(run(True), run(False), strict=True):
        assert (found.float() - expected).norm() < (1e-2 if GPU else 1e-5) * expected.norm()
    if GPU:
        assert all(map(torch.equal, run(True), run(True)))  # no sum depends on the order of programs
