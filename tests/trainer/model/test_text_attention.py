"""The language model's attention kernels against the loop over samples: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trainer.data.packing import cumulative
from trainer.model import hopper_text_attention, text_attention
from trainer.model import text_attention_kernel as kernel
from trainer.model.attention import Segments, attend
from trainer.model.text_attention import attend_causally, hopper_kernels

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


HOPPER = (torch.device("cuda", 0), torch.bfloat16, 128, 32, 8)


@pytest.fixture
def first_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A Hopper card whose kernels do at each first use what the list says, from its end: differ so far, or fail."""
    answers: list[Any] = []

    def apart(_: Any, *layer: Any) -> float:
        assert layer == HOPPER  # with the training's own numbers of heads
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return float(answer)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(text_attention, "_apart", apart)
    hopper_kernels.cache_clear()
    yield answers
    hopper_kernels.cache_clear()


@pytest.mark.parametrize("answer", [0.5, float("nan"), RuntimeError("no such instruction")])
def test_hopper_kernels_that_fail_or_differ_at_first_use_never_compute_and_that_is_said(
    answer: Any, first_use: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer")
    first_use.append(answer)
    assert [hopper_kernels(*HOPPER) for _ in range(2)] == [None, None]
    assert len(caplog.messages) == 1
    assert "Triton's compute" in caplog.messages[0]


def test_hopper_kernels_without_memory_for_their_first_use_are_tried_again(first_use: list[Any]) -> None:
    first_use += [1e-3, torch.OutOfMemoryError("no memory")]
    with pytest.raises(torch.OutOfMemoryError):
        hopper_kernels(*HOPPER)
    assert hopper_kernels(*HOPPER) is hopper_text_attention


def test_a_gpu_that_failed_meanwhile_is_not_taken_for_one_that_lacks_hopper_kernels(
    first_use: list[Any],
) -> None:
    first_use.append(torch.AcceleratorError("an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):
        hopper_kernels(*HOPPER)
