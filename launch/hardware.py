"""What this machine has, without importing torch."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

CPU_PROCESSES = 2  # by default, where there is no GPU

_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")


def gpus_present() -> int:
    """GPUs a process started here would see: the driver's count, narrowed by CUDA_VISIBLE_DEVICES."""
    present = _gpus_of_driver()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or present == 0:
        return present
    named = [name.strip() for name in visible.split(",") if name.strip()]
    if "-1" in named:
        named = named[: named.index("-1")]  # CUDA stops reading there
    return len(named)


def first_visible_gpu() -> str:
    """The name of GPU 0 of a process started here, for CUDA_VISIBLE_DEVICES."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"


@cache
def compute_capability() -> tuple[int, int] | None:
    """The lowest of the GPUs that a process started here would see; None when the driver's tool says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = ["-i", visible] if visible else []  # another card in the machine does not count
    command = [tool, *chosen, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = [line.strip().split(".") for line in listed.stdout.splitlines()]
    return min(((int(a), int(b)) for a, b in (x for x in found if len(x) == 2)), default=None)


def _gpus_of_driver() -> int:
    if _DRIVER_FOLDER.is_dir():
        return sum(1 for _ in _DRIVER_FOLDER.iterdir())
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return (
        sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    )
