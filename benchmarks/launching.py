"""Launches of several processes for benchmarks and tests: `accelerate launch` as a user types it, and what kills it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from launch.strategies import STRATEGIES, default_strategy

ROOT = Path(__file__).resolve().parents[1]


def launch_command(processes: int, arguments: Sequence[str], strategy: str | None = None) -> list[str]:
    """`accelerate launch ... -m ARGUMENTS` with the shipped config of a strategy: by default `single` or `ddp`."""
    name = strategy or default_strategy(processes).name
    config = ROOT / "accelerate_configs" / STRATEGIES[name].config_file
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*command, "--num_processes", str(processes), "-m", *arguments]


def child_environment() -> dict[str, str]:
    """One thread a process, and this checkout before whatever else is imported from."""
    before = [path for path in [os.environ.get("PYTHONPATH", "")] if path]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *before])}


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants: torchrun starts workers in sessions of their own."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to each, and wait until they are gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def accelerate_launch(
    processes: int, arguments: Sequence[str], limit: float = 300, strategy: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Launch and wait for the end."""
    command = launch_command(processes, arguments, strategy)
    environment = child_environment()
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill_all(family(process.pid))
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)
