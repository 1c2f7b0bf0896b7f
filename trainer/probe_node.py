"""`python -m trainer.probe_node`: one process of `samestep doctor` that measures a GPU and an all-reduce.

Prints a JSON line of all figures after each part: the last one counts, also where a part hangs. The processes of a
machine meet as torchrun's do (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`, `LOCAL_RANK`); without them, nothing
is reduced. With `PROBE_HEAD` and its companions, those of all nodes meet afterwards.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

SIZE = 8192  # of the square matrices; smaller on a CPU
CPU_SIZE = 1024
COPY_BYTES = 2**30
REDUCED_BYTES = 32 * 2**20  # more than the gradients of a 7B run's adapters
REPEATS = 5


def main() -> int:
    """Entry point; returns the exit status."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    figures: dict[str, object] = {
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
        "torch": torch.__version__,
    }
    if cuda:
        torch.cuda.set_device(device)
        figures |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    figures |= {"tflops": _products(device), "copy_gb_s": _copies(device)}
    _print(figures)
    if world > 1:
        figures["all_reduce_gb_s"] = _in_a_group(device)
        _print(figures)
    if "PROBE_HEAD" in os.environ:
        os.environ |= {
            "MASTER_ADDR": os.environ["PROBE_HEAD"],
            "MASTER_PORT": os.environ["PROBE_PORT"],
            "RANK": str(int(os.environ["PROBE_FIRST_RANK"]) + rank),
            "WORLD_SIZE": os.environ["PROBE_WORLD_SIZE"],
        }
        figures["across_gb_s"] = _in_a_group(device)
        _print(figures)
    return 0


def _print(figures: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def _in_a_group(device: torch.device) -> float:
    """The all-reduce of a process group that the variables of the environment name."""
    timeout = timedelta(seconds=float(os.environ.get("PROBE_TIMEOUT_S", "30")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        return _all_reduce(device)
    finally:
        dist.destroy_process_group()


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _products(device: torch.device) -> float:
    """10**12 FLOP/s of a square product, bf16 on a GPU and fp32 on a CPU; checks it against one of its rows."""
    size, dtype = (SIZE, torch.bfloat16) if device.type == "cuda" else (CPU_SIZE, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = _median_seconds(lambda: left @ right, device)
    row = left[:1].double() @ right.double()
    error = ((left @ right)[:1].double() - row).abs().max() / row.abs().max()
    if not error < 0.02:  # bf16 keeps 8 bits
        raise SystemExit(
            f"a matrix product is wrong by {float(error):.1e}: this device computes wrong results"
        )
    return 2 * size**3 / seconds / 1e12


def _copies(device: torch.device) -> float:
    """10**9 bytes a second of a copy within the device's memory, reading and writing counted."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 8
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device) / 1e9


def _all_reduce(device: torch.device) -> float:
    """10**9 bytes a second of the reduced tensor, by the slowest of the repeats' median; checks the sum."""
    world = dist.get_world_size()
    tensor = torch.ones(REDUCED_BYTES // 4, device=device)
    dist.all_reduce(tensor)
    if not bool((tensor == world).all()):
        raise SystemExit("an all-reduce gave a wrong sum")
    tensor.zero_()
    return REDUCED_BYTES / _median_seconds(lambda: dist.all_reduce(tensor), device) / 1e9


if __name__ == "__main__":
    sys.exit(main())
