"""Started by `accelerate launch`: does several runs one after another in one process group.

Starting processes costs ten times what these runs do, so one launch does as many as it can. What runs is
`trainer.train` itself; only the process start is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from benchmarks.capped_train import cap_memory, share_one_gpu
from launch.errors import SamestepError
from launch.inputs.dataset_index import Index
from launch.planning import make_plan
from launch.planning.plan import Plan
from launch.run.directory import request_stop
from launch.strategies import STRATEGIES
from tests.helpers.foreign.fsdp_on_cpu import allow_fsdp_on_cpu
from trainer import train
from trainer.checks.training import GradientCheck
from trainer.distributed.collectives import destroy_process_group, end_process
from trainer.logging_setup import setup_logging
from trainer.loop import oom_trial, preparation
from trainer.loop.trainer import PlannedTrainer

STOP_AT: dict[str, int] = {}
"""Name of a run -> the step after which it is to stop, by a STOP file that comes during that step."""

SILENT = "silent"
"""Name of a run, the last of its launch, one of whose adapters gets no gradient but zeros."""

TRIED, FIXED = "tried", "fixed"
"""How the names of two runs begin: one whose largest micro-batch is tried, and one that is planned as that ended."""

_training_step, _trial = PlannedTrainer.training_step, oom_trial._forward_and_backward


def ask_to_stop_in_time(self: PlannedTrainer, *args: object, **kwargs: object) -> object:
    """A training step during which the file comes, where the run is to stop after it."""
    if self.state.global_step + 1 == STOP_AT.get(self.run_directory.name) and self.is_world_process_zero():
        request_stop(self.run_directory, "preempted")
    return _training_step(self, *args, **kwargs)  # type: ignore[arg-type]


def silence_an_adapter(options: argparse.Namespace, index: Index, state: PartialState) -> None:
    """Train without the gradient of one lora_B; write down what that ends with, and whether any weight has changed."""
    seen: dict[str, nn.Parameter] = {}

    def silence(parameters: dict[str, nn.Parameter]) -> GradientCheck:
        seen.update(parameters)
        next(value for name, value in parameters.items() if ".lora_B." in name).register_hook(
            torch.zeros_like
        )
        return GradientCheck(parameters)

    preparation.GradientCheck = silence  # type: ignore[assignment, misc]
    try:
        train.train_once(options, index, state, os.getppid())
    except SamestepError as error:
        trained = any(value.any() for name, value in seen.items() if ".lora_B." in name)
        if state.is_main_process:
            told = {"agreed": error.agreed, "words": str(error), "trained": bool(trained)}
            (options.runs_dir / f"{options.name}.json").write_text(json.dumps(told))


def run_out_of_memory(trainer: PlannedTrainer, *args: object) -> None:
    """Try: the last rank fails in the middle of the backward, with two micro-batches a step rank 0 in the forward.

    `<run>.trials`, beside the run, says so.
    """
    part, failing = {
        1: ("backward", trainer.args.world_size - 1),
        2: ("forward", 0),
    }.get(trainer.plan.micro_batches, ("", None))
    if failing != trainer.args.process_index:
        return _trial(trainer, *args)  # type: ignore[arg-type]

    def fail(*_: object) -> None:
        with trainer.run_directory.path.with_suffix(".trials").open("a") as file:
            file.write(f"{part} of rank {failing}\n")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has ...")

    if part == "backward":
        handle = list(trainer.parameters.values())[len(trainer.parameters) // 2].register_hook(fail)
    else:
        handle = (
            trainer.model.get_base_model()
            .model.language_model.layers[-1]
            .self_attn.register_forward_hook(fail)
        )
    try:
        _trial(trainer, *args)  # type: ignore[arg-type]
    finally:
        handle.remove()


def try_largest(options: argparse.Namespace, index: Index, state: PartialState) -> None:
    """Train with a trial of the largest micro-batch that fails on one rank until there are three of them a step."""
    devices = oom_trial.DEVICES
    oom_trial.DEVICES, oom_trial._forward_and_backward = (state.device.type,), run_out_of_memory
    try:
        train.train_once(options, index, state, os.getppid())
    finally:
        oom_trial.DEVICES, oom_trial._forward_and_backward = devices, _trial


def plan_as_tried(options: argparse.Namespace, index: Index, state: PartialState) -> None:
    """Train without a trial, with the micro-batches that the run before it came down to."""
    tried = options.runs_dir / options.name.replace(FIXED, TRIED, 1) / "plan.json"
    options.set.append(f"batch.micro_batch_tokens={Plan.from_json(tried.read_text()).micro_batch_tokens}")
    train.train_once(options, index, state, os.getppid())


def _train(options: argparse.Namespace, index: Index, state: PartialState) -> None:
    train.train_once(options, index, state, os.getppid())


def main() -> None:
    """Arguments: a JSON file with a list of [arguments of `trainer.train`, step to stop at or null]."""
    setup_logging()
    if torch.cuda.is_available():
        if "WORLD_SIZE" in os.environ and "OWN_GPUS" not in os.environ:
            share_one_gpu()
        cap_memory()
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        allow_fsdp_on_cpu()
    if storage := os.environ.get("PLANTED_STORAGE"):
        make_plan.STRATEGIES = {
            name: replace(strategy, quant_storage=storage) for name, strategy in STRATEGIES.items()
        }
    asked = json.loads(Path(sys.argv[1]).read_text())
    requests = [train.parse(arguments) for arguments, _ in asked]
    STOP_AT.update({options.name: at for options, (_, at) in zip(requests, asked, strict=True) if at})
    PlannedTrainer.training_step = ask_to_stop_in_time  # type: ignore[method-assign]
    indexes = [train.prepare_first(options) for options in requests]
    state = train.init_process_group()
    for options, index in zip(requests, indexes, strict=True):
        special = {SILENT: silence_an_adapter, TRIED: try_largest, FIXED: plan_as_tried}
        special.get(options.name.partition("-")[0], _train)(options, index, state)
    if torch.cuda.is_available():
        gib = torch.cuda.max_memory_allocated() / 2**30
        sys.stdout.write(f"rank {state.process_index}: peak {gib:.2f} GiB\n")
    destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
