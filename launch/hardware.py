"""What this machine has, without importing torch."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPU_PROCESSES = 2  # by default, where there is no GPU
SHARED_MEMORY = Path("/dev/shm")  # where Linux and PyTorch have it

_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")


def gpus_present() -> int:
    """GPUs a process started here would see: the driver's, narrowed by CUDA_VISIBLE_DEVICES."""
    present = _gpus_of_driver()
    return len(visible_ids(os.environ.get("CUDA_VISIBLE_DEVICES"), present)) if present else 0


def first_visible_gpu() -> str:
    """The name of GPU 0 of a process started here, for CUDA_VISIBLE_DEVICES."""
    return next(iter(visible_ids(os.environ.get("CUDA_VISIBLE_DEVICES"), _gpus_of_driver())), "0")


def visible_ids(visible: str | None, uuids: Sequence[str]) -> list[str]:
    """What CUDA takes of CUDA_VISIBLE_DEVICES on a machine of these GPUs: all up to the first that it does not know.

    Numbers as strtoul reads them, or beginnings of UUIDs of one kind; a GPU named twice leaves none. The driver's rule
    as PyTorch 2.14 has written it down (`torch.cuda._device_count_nvml`). An empty UUID is one that the driver does
    not say: then any is believed, as parts of a GPU (MIG) are.
    """
    if visible is None:
        return [str(number) for number in range(len(uuids))]
    named, gpus = [word.strip() for word in visible.split(",")], []
    kind = next((kind for kind in ("GPU-", "MIG-") if named[0].startswith(kind)), "")
    for name in named:
        gpu = _by_uuid(name, kind, uuids) if kind else _by_number(name, len(uuids))
        if gpu is None:
            break
        gpus.append(gpu)
    return gpus if len(gpus) == len({*gpus}) else []


def _by_number(name: str, count: int) -> str | None:
    number = re.match(r"\+?([0-9]+)", name)
    return str(int(number[1])) if number and int(number[1]) < count else None


def _by_uuid(name: str, kind: str, uuids: Sequence[str]) -> str | None:
    if not name.startswith(kind):
        return None
    if kind == "MIG-" or not all(uuids):
        return name
    matching = [uuid for uuid in uuids if uuid.startswith(name)]
    return matching[0] if len(matching) == 1 else None


def compute_capability() -> tuple[int, int] | None:
    """The lowest of the GPUs that a process started here would see; None when the driver's tool says nothing."""
    return min((gpu.capability for gpu in _visible_gpus()), default=None)


def gpu_memory() -> int | None:
    """Bytes of the smallest of these GPUs; None when the driver's tool does not say, or GPUs are divided (MIG)."""
    memories = [gpu.memory for gpu in _visible_gpus()]
    return min((memory for memory in memories if memory), default=None) if all(memories) else None


def gpu_name() -> str:
    """The name of the GPUs that a process started here would see; empty where they differ or nothing says it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    visible = visible_ids(os.environ.get("CUDA_VISIBLE_DEVICES"), _gpus_of_driver())
    selection = ["-i", ",".join(visible)] if visible else []
    command = [tool, *selection, "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    names = {line.strip() for line in listed.stdout.splitlines()} if listed.returncode == 0 else set()
    return names.pop() if len(names) == 1 else ""


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
    visible = visible_ids(os.environ.get("CUDA_VISIBLE_DEVICES"), _gpus_of_driver())
    selection = ["-i", ",".join(visible)] if visible else []  # another card in the machine does not count
    query = "--query-gpu=compute_cap,memory.total,mig.mode.current"
    command = [tool, *selection, query, "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = re.findall(r"^(\d+)\.(\d+), *([^,]*), *(.*)$", listed.stdout, re.MULTILINE)
    return tuple(
        _Gpu((int(major), int(minor)), int(mib) * 2**20 if mib.isdigit() and mig != "Enabled" else None)
        for major, minor, mib, mig in lines
    )


def _gpus_of_driver() -> list[str]:
    """The UUID of every GPU, in the driver's order; empty where the driver does not say it."""
    if _DRIVER_FOLDER.is_dir():
        return [_uuid_in(folder / "information") for folder in sorted(_DRIVER_FOLDER.iterdir())]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listed = subprocess.run(
            [tool, "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [_uuid_of(line) for line in gpus] if listed.returncode == 0 else []


def _uuid_in(file: Path) -> str:
    try:
        return _uuid_of(file.read_text(errors="replace"))
    except OSError:
        return ""


def _uuid_of(text: str) -> str:
    match = re.search(r"UUID:\s*(GPU-[0-9a-f-]+)", text)
    return match[1] if match else ""
