"""What a GPU did in the seconds that `torch.profiler` watched: kernels by time, busy share, waits, communication.

Pure functions on the events of a Chrome trace; `record` makes one.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_WORK = (
    "kernel",
    "gpu_memcpy",
    "gpu_memset",
)  # categories of a trace; annotations span kernels, and are not here
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Event:
    """Something on the GPU, or a call of the CUDA runtime (`kind`: the trace's category); times in seconds."""

    name: str
    kind: str
    begin: float
    end: float

    @property
    def communicates(self) -> bool:
        """A kernel of NCCL: it also lasts while it waits for the other ranks."""
        return self.kind == "kernel" and "nccl" in self.name.lower()


def start_recording() -> Any:
    """A running profiler of the GPU alone: the host's side would slow the steps down."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.start()
    return profiler


def stop_recording(profiler: Any) -> None:
    """Stop when the GPU has done what it was given."""
    import torch

    torch.cuda.synchronize()
    profiler.stop()


def events_of(profiler: Any, file: Path) -> list[Event]:
    """Of a stopped profiler, by way of a file that stays: it opens in Perfetto."""
    profiler.export_chrome_trace(str(file))
    return read_events(json.loads(file.read_text()))


def read_events(trace: dict[str, Any]) -> list[Event]:
    """GPU work and runtime calls of a Chrome trace (its times are microseconds)."""
    kinds = (*GPU_WORK, "cuda_runtime", "cuda_driver")
    return [
        Event(event["name"], event["cat"], event["ts"] / 1e6, (event["ts"] + event.get("dur", 0)) / 1e6)
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]


def union_seconds(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events runs."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda each: each.begin):
        total += max(0.0, event.end - max(event.begin, reached))
        reached = max(reached, event.end)
    return total


def busy_seconds(events: Sequence[Event]) -> float:
    """In which the GPU does anything."""
    return union_seconds(event for event in events if event.kind in GPU_WORK)


def exposed_seconds(events: Sequence[Event]) -> float:
    """In which the GPU does nothing but communicate, or wait in a communication for another rank."""
    computing = [event for event in events if event.kind in GPU_WORK and not event.communicates]
    return busy_seconds(events) - union_seconds(computing)


def top_kernels(events: Sequence[Event], count: int) -> list[tuple[str, float, int]]:
    """(name, seconds together, calls) of the GPU work that took longest."""
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        if event.kind in GPU_WORK:
            seconds[event.name] += event.end - event.begin
            calls[event.name] += 1
    ordered = sorted(seconds, key=lambda name: -seconds[name])[:count]
    return [(name, seconds[name], calls[name]) for name in ordered]


def launches(events: Sequence[Event]) -> int:
    """Kernels, copies and fills that the host gave the GPU."""
    return sum(event.kind in GPU_WORK for event in events)


def host_syncs(events: Sequence[Event]) -> int:
    """Calls in which the host waited for the GPU."""
    return sum(event.name in SYNCS for event in events)
