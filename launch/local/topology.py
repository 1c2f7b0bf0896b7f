"""How many processes on how many machines a request starts."""

from __future__ import annotations

from dataclasses import replace

from launch.errors import ConfigError
from launch.hardware import CPU_PROCESSES, gpu_memory, gpus_present
from launch.planning.auto_settings import parse_gpu_memory
from launch.planning.topology import Topology
from launch.strategies import AUTO, STRATEGIES


def choose_topology(strategy: str | None, nodes: int, gpus_per_node: int | None) -> Topology:
    """Fill in what was not said: the GPUs present (2 processes on a CPU), and `AUTO`, which planning resolves."""
    present = gpus_present()
    count = gpus_per_node if gpus_per_node is not None else (present or CPU_PROCESSES)
    if strategy is None:
        strategy = AUTO
    elif gpus_per_node is None and strategy in STRATEGIES and STRATEGIES[strategy].is_one_process:
        count = 1
    return Topology(strategy, nodes, count, "cuda" if present else "cpu", gpu_memory() if present else None)


def for_gpus_of(topology: Topology, memory: str | None) -> Topology:
    """The topology with GPUs of a memory that the command line says, whatever this machine has. ConfigError."""
    if memory is None:
        return topology
    return replace(topology, device="cuda", gpu_memory=parse_gpu_memory(memory))


def refuse_missing_gpus(topology: Topology) -> None:
    """ConfigError when this machine has fewer GPUs than processes are to be started, or none are."""
    present = gpus_present()
    if topology.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node: {topology.gpus_per_node} starts nothing; give at least 1")
    if topology.device == "cuda" and topology.gpus_per_node > present:
        raise ConfigError(
            f"--gpus-per-node: this machine shows fewer GPUs ({present} < {topology.gpus_per_node}); "
            f"ask for at most {present}, or see CUDA_VISIBLE_DEVICES"
        )
