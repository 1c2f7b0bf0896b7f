"""The upper floor: what runs on the compute node."""

import logging
import os

from launch.inputs.caches import private_cache
from launch.interrupts import hide_interrupts
from launch.launcher_variables import PARENT
from trainer import watchdog
from trainer.garbage import pause_collection
from trainer.package_names import look_up_by_name

hide_interrupts()
pause_collection()
look_up_by_name()
WATCHDOG = watchdog.start(os.environ)
"""Begins before the imports of substance: a launcher may die in the seconds that they take."""
os.environ.pop(PARENT, None)  # meant for this process, not for its children

# Packed micro-batches differ in size; segments of GPU memory that grow leave no holes between them. PyTorch reads this
# while it is imported. Whoever set something else keeps it.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# Nothing here is compiled. bitsandbytes 0.50 hands functions to torch.compile while it is imported, which alone takes
# Inductor's import, a sixth of all (needed while `import bitsandbytes` brings `torch._inductor.compile_fx` without it).
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# Triton's kernels outlive the machine where the cache folder does; a rank that finds them starts seconds sooner.
if "TRITON_CACHE_DIR" not in os.environ and (_kernels := private_cache("triton")):
    os.environ["TRITON_CACHE_DIR"] = str(_kernels)

# On some processors bitsandbytes 0.50 warns, while it is imported, that an optional package of CPU kernels is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
