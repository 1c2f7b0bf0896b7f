"""Started by `accelerate launch`: does several runs one after another in one process group.

Starting processes costs ten times what these runs do, so one launch does as many as it can. What runs is
`trainer.train` itself; only the process start is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from launch import plan, rules
from launch.errors import SamestepError
from launch.index import Index
from launch.run_directory import request_stop
from tests.foreign.fsdp_on_cpu import allow_fsdp_on_cpu
from trainer import processes, sft, train
from trainer.agreement import end_process, leave_processes
from trainer.guards import GradientWitness
from trainer.sft import PlannedTrainer
from trainer.speech import speak_plainly

STOP_AT: dict[str, int] = {}
"""Name of a run -> the step after which it is to stop, by a STOP file that comes during that step."""

SILENT = "silent"
"""Name of a run, the last of its launch, one of whose adapters gets no gradient but zeros."""

_training_step = PlannedTrainer.training_step


def ask_to_stop_in_time(self: PlannedTrainer, *args: object, **kwargs: object) -> object:
    """A training step during which the file comes, where the run is to stop after it."""
    if self.state.global_step + 1 == STOP_AT.get(self.run_directory.name) and self.is_world_process_zero():
        request_stop(self.run_directory, "preempted")
    return _training_step(self, *args, **kwargs)  # type: ignore[arg-type]


def silence_an_adapter(options: argparse.Namespace, index: Index, state: PartialState) -> None:
    """Train without the gradient of one lora_B; write down what that ends with, and whether any weight has changed."""
    seen: dict[str, nn.Parameter] = {}

    def silence(parameters: dict[str, nn.Parameter]) -> GradientWitness:
        seen.update(parameters)
        next(value for name, value in parameters.items() if ".lora_B." in name).register_hook(
            torch.zeros_like
        )
        return GradientWitness(parameters)

    sft.GradientWitness = silence  # type: ignore[assignment, misc]
    try:
        train.train_once(options, index, state, os.getppid())
    except SamestepError as error:
        trained = any(value.any() for name, value in seen.items() if ".lora_B." in name)
        if state.is_main_process:
            told = {"agreed": error.agreed, "words": str(error), "trained": bool(trained)}
            (options.runs_dir / f"{options.name}.json").write_text(json.dumps(told))


def share_one_gpu() -> None:
    """Ranks without `OWN_GPUS`: gloo carries CUDA tensors where NCCL wants a GPU for each rank.

    `CAP_GIB`: the most memory that each rank may take.
    """
    os.environ["LOCAL_RANK"] = "0"
    if cap := os.environ.get("CAP_GIB"):
        torch.cuda.set_per_process_memory_fraction(
            float(cap) * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )

    def start() -> PartialState:
        processes.find_deepspeed_config()
        return PartialState(backend="gloo", timeout=processes.PATIENCE)

    train.start_processes = start


def _train(options: argparse.Namespace, index: Index, state: PartialState) -> None:
    train.train_once(options, index, state, os.getppid())


def main() -> None:
    """Arguments: a JSON file with a list of [arguments of `trainer.train`, step to stop at or null]."""
    speak_plainly()
    if torch.cuda.is_available():
        if "WORLD_SIZE" in os.environ and "OWN_GPUS" not in os.environ:
            share_one_gpu()
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        allow_fsdp_on_cpu()
        rules.REQUEST_RULES = tuple(rule for rule in rules.REQUEST_RULES if rule is not rules.fsdp_has_gpus)
    if storage := os.environ.get("PLANTED_STORAGE"):
        plan.storage_of = lambda _: storage
    asked = json.loads(Path(sys.argv[1]).read_text())
    requests = [train.parse(arguments) for arguments, _ in asked]
    STOP_AT.update({options.name: at for options, (_, at) in zip(requests, asked, strict=True) if at})
    PlannedTrainer.training_step = ask_to_stop_in_time  # type: ignore[method-assign]
    indexes = [train.prepare_first(options) for options in requests]
    state = train.start_processes()
    for options, index in zip(requests, indexes, strict=True):
        run = silence_an_adapter if options.name == SILENT else _train
        run(options, index, state)
    if torch.cuda.is_available():
        gib = torch.cuda.max_memory_allocated() / 2**30
        sys.stdout.write(f"rank {state.process_index}: peak {gib:.2f} GiB\n")
    leave_processes()
    end_process(0)


if __name__ == "__main__":
    main()
