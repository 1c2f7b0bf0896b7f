"""The processes of a run: how they find each other, and that all of them run the same."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from launch.errors import RunError
from launch.resources import resource
from launch.rules.accelerate_config import launched_config, launched_strategy
from launch.rules.checks import refuse_unfit_machine
from trainer.distributed.collectives import gather_objects, run_on_all_ranks, run_on_main
from trainer.task import Task

logger = get_logger("trainer")
# Nodes that read a large base at unequal speed wait for each other.
PROCESS_GROUP_TIMEOUT = timedelta(hours=1)


def init_process_group() -> PartialState:
    """Join the process group that the launcher asked for: NCCL on GPUs, gloo on CPUs."""
    find_deepspeed_config()
    stay_on_this_machine()
    if uses_deepspeed() and not torch.cuda.is_available():
        _compile_nothing()
    with _interruptible():
        if torch.cuda.is_available():
            return PartialState(timeout=PROCESS_GROUP_TIMEOUT)
        # With `cpu=True` accelerate 1.15 would forget DeepSpeed, and without a backend the others.
        if uses_deepspeed():
            return PartialState(backend="gloo", timeout=PROCESS_GROUP_TIMEOUT)
        return PartialState(cpu=True, timeout=PROCESS_GROUP_TIMEOUT)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a Ctrl-C end the process at once: Python would hear of it only when the other ranks have come."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change this
        return
    usual = signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def stay_on_this_machine() -> None:
    """gloo listens on the address of the machine's name, for everybody; ranks that are all here meet on loopback."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None and local == os.environ.get("WORLD_SIZE") and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _compile_nothing() -> None:
    """Start DeepSpeed on CPUs without the collectives that it would compile for a minute, with a C++ compiler.

    They are for tensor-parallel inference alone (`inference_all_reduce` in deepspeed/comm/torch.py, 0.19.8).
    """
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def uses_deepspeed() -> bool:
    """Return whether the launcher's config names DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def find_deepspeed_config() -> None:
    """Make the DeepSpeed file that a shipped accelerate config names findable from every folder."""
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if name in ("ds_configs/zero2.json", "ds_configs/zero3.json") and not Path(name).is_file():
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(resource("ds_configs", Path(name).name))


def smallest_gpu(device: torch.device) -> int | None:
    """Return the memory in bytes of the smallest GPU of all ranks, None on CPUs. A collective."""
    mine = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    memories = [memory for memory in gather_objects(mine) if memory is not None]
    return min(memories, default=None)


def check_same_plan(task: Task, state: PartialState) -> None:
    """Say first what runs, and make sure that every rank runs the same.

    Raises:
        ConfigError: a rank's packages or GPU are too old for the plan.
        RunError: the launched strategy or world is not the plan's, or a rank made another plan.
    """
    plan, launched = task.plan, launched_strategy(launched_config(os.environ), "LOCAL_RANK" in os.environ)
    logger.info(f"strategy {plan.strategy}, world size {state.num_processes}, run {task.run.path}")

    def check() -> None:
        if state.device.type != plan.device:
            raise RunError(
                f"rank {state.process_index}: torch works on {state.device.type}, the plan is for {plan.device}; "
                "torch and the GPU driver do not fit each other, or the GPU is hidden (CUDA_VISIBLE_DEVICES)"
            )
        # A plan that was made elsewhere knows neither these packages nor these GPUs.
        refuse_unfit_machine(task.recipe, plan.strategy, capability_of(state.device))
        if state.num_processes != plan.world_size:
            raise RunError(
                f"--num_processes: the launcher started {state.num_processes} processes, the plan is for "
                f"{plan.world_size}; start as many, or let `samestep run` start them"
            )
        if launched != plan.strategy:
            raise RunError(
                f"--config_file: it launches {launched}, the plan is for {plan.strategy}; take accelerate_configs/"
                f"{plan.strategy}.yaml, or let `samestep run` start the processes"
            )

    run_on_all_ranks(check)
    digests = gather_objects(plan.digest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]

    def compare() -> None:
        if differing:
            raise RunError(
                f"its plan differs from rank {differing[0]}'s ({len(differing)} ranks differ); the nodes see other "
                "data, recipes or library versions; share SAMESTEP_CACHE, or make them alike"
            )

    run_on_main(compare)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
