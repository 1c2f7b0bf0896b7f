"""How many processes on how many machines a request starts."""

from __future__ import annotations

import os
from dataclasses import replace

import psutil

from launch.errors import ConfigError
from launch.hardware import CPU_PROCESSES, gpu_memory, gpus_present
from launch.planning.auto_settings import parse_gpu_memory
from launch.planning.topology import Topology
from launch.strategies import AUTO, STRATEGIES
from launch.units import decimal_size

PROCESSES_A_CORE = 4
"""The most on a CPU: they take turns, and collectives wait for the last one."""
BYTES_A_PROCESS = 700 * 10**6
"""Of memory that it shares with no other, with a tiny model (0.6 GB measured; torch and the libraries alone 0.5)."""


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


def refuse_what_is_not_here(topology: Topology) -> None:
    """ConfigError when this machine cannot carry the processes: too few GPUs, without any too few cores or memory."""
    present = gpus_present()
    if topology.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node: {topology.gpus_per_node} starts nothing; give at least 1")
    if topology.device == "cuda" and topology.gpus_per_node > present:
        raise ConfigError(
            f"--gpus-per-node: this machine shows fewer GPUs ({present} < {topology.gpus_per_node}); "
            f"ask for at most {present}, or see CUDA_VISIBLE_DEVICES"
        )
    if topology.device == "cpu":
        _refuse_crowd(topology.gpus_per_node)


def _refuse_crowd(processes: int) -> None:
    """ConfigError when so many processes would get nowhere on this machine's cores, or not fit into its memory."""
    cores, free = len(os.sched_getaffinity(0)), psutil.virtual_memory().available
    most = max(CPU_PROCESSES, min(PROCESSES_A_CORE * cores, free // BYTES_A_PROCESS))
    if processes > most:
        raise ConfigError(
            f"--gpus-per-node: {processes} processes are too many without GPUs ({cores} cores for {PROCESSES_A_CORE} "
            f"processes each, {decimal_size(free)} of memory free for {decimal_size(BYTES_A_PROCESS)} each); give at "
            f"most {most}, or leave it out for {CPU_PROCESSES}"
        )
