"""Hopper's attention kernels, compiled for the card without one: names of their language have changed before."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.compiling import compile_without_a_card

PROGRAM = """
def report(kernel, compiled):
    assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.asm["cubin"]
    print(kernel.fn.__name__)


from trainer.model import hopper_text_attention as text
from trainer.model.hopper_tower_attention import attend_images_on_hopper

bounds, lengths = torch.tensor([0, 20, 50], dtype=torch.int32), (20, 30)
q, k = torch.zeros(50, 8, 128, dtype=torch.bfloat16), torch.zeros(50, 2, 128, dtype=torch.bfloat16)
_, sums = text.attend(q, k, k, bounds, lengths, 0.1)
text.gradients(q, k, k, q, sums, sums, bounds, lengths, 0.1)
q = torch.zeros(50, 16, 80, dtype=torch.bfloat16)
attend_images_on_hopper(q, q, q, bounds, lengths, 0.1)
"""


def test_they_compile_for_hopper_with_the_installed_triton(tmp_path: Path) -> None:
    assert {*compile_without_a_card(PROGRAM, tmp_path)} == {"_forward", "_of_keys", "_of_queries", "_attend"}
