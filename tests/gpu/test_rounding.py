"""The dequantized base, made on a CPU, beside what bitsandbytes makes of the same weights on a GPU."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from trainer.export.requantize import Rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_rounding_on_a_cpu_is_that_of_a_gpu_but_for_numbers_on_the_edge_between_two_steps() -> None:
    weight = (torch.randn(3584, 3584, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    rounding = Rounding("nf4", double_quant=True, dtype=torch.bfloat16, names=frozenset())
    packed, state = functional.quantize_4bit(weight.cuda(), compress_statistics=True, quant_type="nf4")
    on_gpu = functional.dequantize_4bit(packed, state).cpu().float()
    on_cpu = rounding.rounded(weight).float()
    error = (on_gpu - weight.float()).abs().mean()
    assert (on_gpu - on_cpu).abs().mean() < 1e-3 * error
