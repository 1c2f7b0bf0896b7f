"""The kernel that takes weights out of their 4 bits, in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from trainer.model.nf4_kernel import can_dequantize, dequantize


@pytest.mark.parametrize("shape", [(64, 64), (130, 190), (3, 2)], ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["scales in 8 bits", "plain scales"])
def test_values_are_those_of_bitsandbytes_to_the_bit(shape: tuple[int, int], nested: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    assert can_dequantize(state)
    expected = dequantize_4bit(packed, state)
    assert torch.equal(dequantize(packed, state), expected)
    if packed.numel() % 2 == 0:  # as fsdp stores them
        assert torch.equal(dequantize(packed.view(-1).view(torch.float16).view(-1, 1), state), expected)


@pytest.mark.parametrize(
    ("changed", "can"),
    [({}, True), ({"quant_type": "fp4"}, False), ({"blocksize": 4096}, False), ({"shape": (3, 3)}, False)],
    ids=str,
)
def test_what_the_kernel_does_not_know_is_left_to_bitsandbytes(changed: dict[str, Any], can: bool) -> None:
    absmax = torch.zeros(1, dtype=torch.uint8)
    state = SimpleNamespace(quant_type="nf4", blocksize=64, nested=True, absmax=absmax, shape=(64, 64))
    state.__dict__.update(changed)
    assert can_dequantize(state) is can
