"""LoRA's Triton kernels against their plain forms: on a GPU, or in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.compiling import compile_without_a_card
from trainer.model.dropout import DRAWS, channel_words, keep_mask, module_keys, row_keys, token_keys
from trainer.model.lora_kernels import Adapter, adapter_gradients, add_back, add_up, project

TOKENS, CHANNELS, DROPPED = 70, 201, 6000  # no multiple of any tile
SCALE = DRAWS / (DRAWS - DROPPED)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 1e-5, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 1e-2, "atol": 5e-2}  # TensorFloat32


def adapters_of(ranks: Sequence[int], dropped: int) -> list[Adapter]:
    """Random ones, each with a mask of its own."""
    draw = torch.Generator().manual_seed(0)
    tokens = token_keys(1, 2, torch.arange(TOKENS) // 10, torch.arange(TOKENS) % 10)
    rows = row_keys(tokens, module_keys([str(number) for number in range(len(ranks))])).to(DEVICE)
    words = channel_words((CHANNELS + 1) // 2, torch.device(DEVICE))
    scale = SCALE if dropped else 1.0
    downs = [torch.randn(rank, CHANNELS, generator=draw).to(DEVICE) for rank in ranks]
    return [Adapter(down, own, words, dropped, scale, 2.0) for down, own in zip(downs, rows, strict=True)]


def test_the_mask_of_the_kernels_is_that_of_the_plain_form_to_the_bit() -> None:
    ones = torch.ones(TOKENS, CHANNELS, device=DEVICE)
    pair = adapters_of([16, 16], DROPPED)
    keeps = [keep_mask(adapter.rows, CHANNELS, DROPPED).float() for adapter in pair]
    for begin in range(0, CHANNELS, 16):
        width = min(16, CHANNELS - begin)
        pick = torch.zeros(16, CHANNELS, device=DEVICE)
        pick[range(width), range(begin, begin + width)] = 1
        picking = [adapter._replace(down=pick, scale=1.0, factor=1.0) for adapter in pair]
        for seen, keep in zip(project(ones, picking), keeps, strict=True):
            assert torch.equal(seen[:, :width], keep[:, begin : begin + width])


@pytest.mark.parametrize("dropped", [0, DROPPED])
@pytest.mark.parametrize("ranks", [(8,), (8, 8, 8), (8, 24)])  # alone; two at once and one alone; unlike
def test_projections_and_their_gradients_are_those_of_the_plain_form(
    ranks: Sequence[int], dropped: int
) -> None:
    draw = torch.Generator().manual_seed(1)
    adapters = adapters_of(ranks, dropped)
    x = torch.randn(TOKENS, CHANNELS, generator=draw).to(DEVICE)
    inners = [torch.randn(TOKENS, rank, generator=draw).to(DEVICE) for rank in ranks]
    factors = [keep_mask(each.rows, CHANNELS, dropped) * SCALE if dropped else 1.0 for each in adapters]
    of_x = torch.ones(TOKENS, CHANNELS, device=DEVICE)
    output, expected_of_x = of_x.clone(), of_x.clone()
    projected, of_downs = project(x, adapters), adapter_gradients(x, inners, adapters)
    add_back(of_x, inners, adapters)
    for number, (adapter, inner, factor) in enumerate(zip(adapters, inners, factors, strict=True)):
        torch.testing.assert_close(projected[number], 2 * (x * factor) @ adapter.down.t(), **CLOSE)
        torch.testing.assert_close(of_downs[number], 2 * inner.t() @ (x * factor), **CLOSE)
        expected_of_x += 2 * factor * (inner @ adapter.down)
    torch.testing.assert_close(of_x, expected_of_x, **CLOSE)
    add_up(output, inners[0], adapters[0].down.t().contiguous())
    torch.testing.assert_close(output, 1 + inners[0] @ adapters[0].down, **CLOSE)


PROGRAM = """
from itertools import product

from trainer.model import lora_kernels


def report(kernel, compiled):
    print(compiled.metadata.shared)


x, rows = torch.empty(128, 256, dtype=torch.bfloat16), torch.empty(128, 2, dtype=torch.int32)
for NoCard.capability, rank in product((80, 86, 89, 90), (16, 32, 64, 128)):
    adapters = [lora_kernels.Adapter(torch.empty(rank, 256), rows, rows[:, 0], 99, 1.1, 2.0)] * 2
    inners = [torch.empty(128, rank, dtype=torch.bfloat16)] * 2
    lora_kernels.project(x, adapters)
    lora_kernels.adapter_gradients(x, inners, adapters)
    lora_kernels.add_back(x, inners, adapters)
    lora_kernels.add_up(x, inners[0], torch.empty(256, rank))
"""


def test_the_tiles_of_two_adapters_fit_into_every_cards_shared_memory_at_every_rank(tmp_path: Path) -> None:
    shared = [int(size) for size in compile_without_a_card(PROGRAM, tmp_path)]
    assert len(shared) == 4 * 16
    assert max(shared) <= 99 * 1024
