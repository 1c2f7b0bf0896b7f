"""Weights out of their 4 bits on a GPU: the kernel and what takes it."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("nested", [True, False], ids=["scales in 8 bits", "plain scales"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_weight_comes_out_of_its_bits_as_bitsandbytes_brings_it_out(
    dtype: torch.dtype, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.model import nf4_kernel, resident

    calls = []
    stock = nf4_kernel.dequantize
    monkeypatch.setattr(nf4_kernel, "dequantize", lambda *given: calls.append(1) or stock(*given))
    for shape in ((3584, 512), (3420, 1280), (130, 190), (7, 2)):
        weight = (torch.randn(shape, device="cuda") * 0.02).to(dtype)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        assert torch.equal(resident.matrix_of(packed, state, dtype), dequantize_4bit(packed, state))
    assert len(calls) == 4
