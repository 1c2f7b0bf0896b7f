"""Plan -> argv of `accelerate launch`: the only file that says num_machines, num_processes, machine_rank."""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Layout(Protocol):
    """What the launcher has to know of a plan or a topology."""

    @property
    def strategy(self) -> str: ...
    @property
    def nodes(self) -> int: ...
    @property
    def gpus_per_node(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> str: ...


def launch_command(
    layout: Layout,
    *,
    config_file: Path,
    module: str,
    module_args: Sequence[str],
    port: int,
    machine_rank: int = 0,
    main_process_ip: str = "127.0.0.1",
    cpu_threads: int | None = None,
    python: str = sys.executable,
) -> list[str]:
    """argv that starts this node's processes of `python -m module *module_args`.

    By `trainer.launcher`, which is `accelerate launch` for a program that waits for it.

    `port`: of the rendezvous, free on the first node. `cpu_threads`: of each process (by accelerate: 1).
    Process counts go on the command line: accelerate 1.15 without them raises, or starts another number.
    """
    command = [python, "-m", "trainer.launcher", "--config_file", str(config_file)]
    command += ["--num_machines", str(layout.nodes), "--num_processes", str(layout.world_size)]
    command += ["--machine_rank", str(machine_rank), "--main_process_ip", main_process_ip]
    command += ["--main_process_port", str(port)]
    if cpu_threads is not None:
        command += ["--num_cpu_threads_per_process", str(cpu_threads)]
    return [*command, "--module", module, *module_args]


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def cpu_threads_of(layout: Layout) -> int | None:
    """Threads of a process: its share of the cores on a CPU; None: GPUs work, or OMP_NUM_THREADS is set."""
    if layout.device != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // layout.gpus_per_node)
