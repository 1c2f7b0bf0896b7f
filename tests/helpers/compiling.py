"""Triton kernels compiled for a card that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_BEGIN = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class NoCard:
    capability = 90

    def get_current_device(self):
        return self.capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, *arguments, **options):
    compiled = launch(kernel, *arguments, **options | {"warmup": True})
    report(kernel, compiled)
    return compiled


driver.set_active(NoCard())
launch, JITFunction.run = JITFunction.run, compile_only

from trainer.model import kernel_launch

kernel_launch._launch_of = lambda *_: None
"""


def compile_without_a_card(program: str, cache: Path) -> list[str]:
    """Return the words that a program prints whose launches of kernels compile them alone, in a process of its own.

    It defines `report(kernel, compiled)`, which is called for each, and may set `NoCard.capability` (90: Hopper).
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
