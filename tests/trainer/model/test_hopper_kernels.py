"""Hopper's attention kernels, compiled for the card without one: names of their language have changed before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class NoCard:
    def get_current_device(self):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, *arguments, **options):
    compiled = launch(kernel, *arguments, **options | {"warmup": True})
    assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.asm["cubin"]
    print(kernel.fn.__name__)
    return compiled


driver.set_active(NoCard())
launch, JITFunction.run = JITFunction.run, compile_only

from trainer.model import kernel_launch

kernel_launch._launch_of = lambda *_: None
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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"_forward", "_of_keys", "_of_queries", "_attend"}
