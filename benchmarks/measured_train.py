"""Started by `accelerate launch` in the place of `trainer.train`: the same training, with a clock on every rank.

    -m benchmarks.measured_train FOLDER PROFILED_STEP ASSIGNMENT arguments of trainer.train ...

Every rank writes `FOLDER/rank-<rank>.jsonl`: a line a step with the moments (seconds of the machine's monotonic clock,
which all ranks of a machine share) of its first micro-batch and of its end, and, where the ranks add up after the
backward pass, of the end of its computation before that and of the end of that addition; then a line of facts (peak
memory, an all-reduce by itself, one profiled step).
`ASSIGNMENT`: `balanced`, or `random` for a step's samples given out as a shuffling sampler would.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from benchmarks import gpu_trace
from benchmarks.scaling import random_deal
from launch.planning import step_plan
from trainer import train
from trainer.checks.sharding import resident_bytes, whole_bytes
from trainer.distributed.collectives import destroy_process_group, end_process
from trainer.engine.replicated import Replicated
from trainer.loop.callbacks import StepEnd
from trainer.loop.trainer import PlannedTrainer

REPEATS = 20


def synchronize() -> None:
    """Wait for this rank's GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """The moments of this rank's steps, and what is known at the end."""

    def __init__(self, folder: Path, profiled_step: int) -> None:
        rank = int(os.environ.get("RANK", "0"))
        folder.mkdir(parents=True, exist_ok=True)
        self.trace_file = folder / f"rank-{rank}.trace.json"
        self.output: TextIO = (folder / f"rank-{rank}.jsonl").open("w")
        self.profiled_step = profiled_step
        self.profiler: Any = None
        self.profile_began = 0.0
        self.moments: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.reduced = 0
        self.first_mark: tuple[torch.cuda.Event, float] | None = None

    def mark(self) -> Callable[[], float]:
        """The moment at which the GPU has done what it was given so far; to ask for it waits for that.

        The first mark ties the GPU's clock to the machine's. Without a GPU it is now.
        """
        if not torch.cuda.is_available():
            now = time.perf_counter()
            return lambda: now
        if self.first_mark is None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            event.synchronize()
            self.first_mark = event, time.perf_counter()
        (first, moment), event = self.first_mark, torch.cuda.Event(enable_timing=True)
        event.record()

        def reached() -> float:
            event.synchronize()
            return moment + first.elapsed_time(event) / 1e3

        return reached

    def base_is_loaded(self, trainer: PlannedTrainer) -> None:
        """Before the largest micro-batch is tried, after which sharded layers may stay whole."""
        layers = trainer.model.get_base_model().model.language_model.layers
        self.facts = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "layers_gib": sum(resident_bytes(layer) for layer in layers) / 2**30,
            "whole_layers_gib": sum(whole_bytes(layer) for layer in layers) / 2**30,
            "loading_gib": peak_gib(),
        }

    def write(self, values: dict[str, Any]) -> None:
        self.output.write(json.dumps(values) + "\n")
        self.output.flush()

    def begin_step(self, trainer: PlannedTrainer) -> None:
        """Its data is there."""
        if not self.reduced:
            sizes = [getattr(each, "ds_numel", each.numel()) for each in trainer.parameters.values()]
            self.reduced = sum(sizes)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        self.moments = {"begin": time.perf_counter()}

    def end_step(self, step: int) -> None:
        self.write({"step": step, **self.moments, "end": time.perf_counter()})
        if not torch.cuda.is_available():
            return
        try:  # a profiler that fails costs one figure, not the run
            if step == self.profiled_step and self.profiler is not None:
                gpu_trace.stop_recording(self.profiler)
                self.facts["profiled_s"] = time.perf_counter() - self.profile_began
            if step + 1 == self.profiled_step:
                self.profiler = gpu_trace.start_recording()
                self.profile_began = time.perf_counter()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        sys.stderr.write(f"no profile: {type(error).__name__}: {error}\n")
        self.profiler = None

    def finish(self) -> None:
        """The last line, while the ranks are still together."""
        self.facts |= {"training_gib": peak_gib(), "all_reduce_s": all_reduce_alone(self.reduced)}
        self.write(self.facts)  # before what might fail
        if self.profiler is None:
            return
        try:
            events = gpu_trace.events_of(self.profiler, self.trace_file)
        except Exception as error:
            self.give_up(error)
            return
        self.facts |= {
            "profiled_busy_s": gpu_trace.busy_seconds(events),
            "profiled_exposed_s": gpu_trace.exposed_seconds(events),
            "profiled_syncs": gpu_trace.host_syncs(events),
            "profiled_launches": gpu_trace.launches(events),
        }
        self.write(self.facts)


def peak_gib() -> float | None:
    """Of the memory that tensors took on this rank's GPU since the last look, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def all_reduce_alone(elements: int) -> float | None:
    """Median seconds of adding up `elements` fp32 numbers over the ranks, which come together."""
    if not dist.is_initialized() or not elements:
        return None
    values = torch.zeros(elements, device="cuda" if torch.cuda.is_available() else "cpu")
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        synchronize()
        began = time.perf_counter()
        dist.all_reduce(values)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def watch(clock: Clock) -> None:
    """Put the clock around the trainer's own functions."""
    training_step, on_step_end = PlannedTrainer.training_step, StepEnd.on_step_end

    def begin(self: PlannedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.at_first_micro_batch:
            clock.begin_step(self)
        return training_step(self, *args, **kwargs)

    def end(self: StepEnd, *args: Any, **kwargs: Any) -> None:
        on_step_end(self, *args, **kwargs)
        clock.end_step(self.trainer.state.global_step)
        self.step_began = time.perf_counter()  # what the clock did between two steps belongs to none

    PlannedTrainer.training_step, StepEnd.on_step_end = begin, end  # type: ignore[method-assign]
    Replicated.all_reduce = timed(Replicated.all_reduce, clock)  # type: ignore[method-assign]


def timed(all_reduce: Any, clock: Clock) -> Any:
    """`all_reduce` with the moments before and after it, as the GPU reaches them: the host waits for nothing more."""

    def measured(self: Any, values: Any, meanwhile: Callable[[], None]) -> Any:
        done: list[Callable[[], float]] = []

        def reduced_then_meanwhile() -> None:
            done.append(clock.mark())
            meanwhile()

        ready = clock.mark()
        reduced = all_reduce(self, values, reduced_then_meanwhile)
        clock.moments |= {"ready": ready(), "done": done[0]()}
        return reduced

    return measured


def main() -> int:
    """As `trainer.train`; returns its exit status."""
    folder, profiled_step, assignment, *arguments = sys.argv[1:]
    if assignment == "random":
        step_plan.assign = random_deal
    clock = Clock(Path(folder), int(profiled_step))
    watch(clock)

    fit_to_memory = train.fit_to_memory

    def fit_afterwards(trainer: PlannedTrainer) -> None:
        clock.base_is_loaded(trainer)
        fit_to_memory(trainer)

    def leave() -> None:
        clock.finish()
        destroy_process_group()

    train.fit_to_memory, train.destroy_process_group = fit_afterwards, leave
    return train.main(arguments)


if __name__ == "__main__":
    end_process(main())
