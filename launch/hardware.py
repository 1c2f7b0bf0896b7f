"""What this machine has, without importing torch."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
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


def compute_capability() -> tuple[int, int] | None:
    """The lowest of the GPUs that a process started here would see; None when the driver's tool says nothing."""
    return min((gpu.capability for gpu in _visible_gpus()), default=None)


def gpu_memory() -> int | None:
    """Bytes of the smallest of these GPUs; None when the driver's tool does not say, or GPUs are divided (MIG)."""
    found = [gpu.memory for gpu in _visible_gpus()]
    return min((memory for memory in found if memory), default=None) if all(found) else None


@dataclass(frozen=True)
class _Gpu:
    capability: tuple[int, int]
    memory: int | None  # bytes


@cache
def _visible_gpus() -> tuple[_Gpu, ...]:
    """The GPUs that a process started here would see, by the driver's tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = ["-i", visible] if visible else []  # another card in the machine does not count
    query = "--query-gpu=compute_cap,memory.total,mig.mode.current"
    command = [tool, *chosen, query, "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.findall(r"^(\d+)\.(\d+), *([^,]*), *(.*)$", listed.stdout, re.MULTILINE)
    return tuple(
        _Gpu((int(major), int(minor)), int(mib) * 2**20 if mib.isdigit() and mig != "Enabled" else None)
        for major, minor, mib, mig in found
    )


def _gpus_of_driver() -> int:
    if _DRIVER_FOLDER.is_dir():
        return sum(1 for _ in _DRIVER_FOLDER.iterdir())
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run(
            [tool, "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return (
        sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    )
