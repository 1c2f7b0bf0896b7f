"""Imported by the server that ranks are forked off: the libraries, and nothing of ours.

Python's collector leaves out what they made, in the server and in each rank: that would copy every page of memory that
the collector looks at.
"""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress
from pathlib import Path

LIBRARIES = (
    "accelerate.commands.launch",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "peft",
    "trl",
    "trl.trainer.sft_trainer",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "torch.utils.tensorboard",
)

gc.disable()
for library in LIBRARIES:
    with suppress(ImportError):
        importlib.import_module(library)
gc.enable()
gc.freeze()
if not Path("/proc/driver/nvidia/version").exists():  # after a training its model would stay on the GPU
    gc.unfreeze = lambda: None
