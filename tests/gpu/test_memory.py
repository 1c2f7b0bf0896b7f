"""GPU memory that a training process takes. Skips itself without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_segments_of_gpu_memory_can_grow_in_a_training_process() -> None:
    program = (
        "import os\n"
        "os.environ.pop('PYTORCH_ALLOC_CONF', None)\n"
        "import trainer.train, torch\n"
        "torch.empty(1, device='cuda')\n"
        "print(any(part['is_expandable'] for part in torch.cuda.memory._snapshot()['segments']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["True"], ended.stderr
