"""Launches without the seconds of imports: ranks are forked off a process that holds the libraries already.

An interpreter that imports PyTorch, transformers and trl takes longer than most runs of the tests. One server process
of the standard library (`multiprocessing`'s forkserver) imports them once; each launch forks a launcher off it, and
that one its ranks, with the environment that `accelerate launch` gives them. What the ranks run, all of `launch` and
`trainer`, they import anew. Tests of launching itself use `benchmarks.launching.accelerate_launch`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.launching import (
    ROOT,
    accelerate_launch,
    child_environment,
    family,
    kill_all,
    launch_command,
)

BEFORE_IMPORTS = {"TORCHDYNAMO_DISABLE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""What `trainer/__init__.py` sets, and libraries read while they are imported."""
OTHERS_S = 40.0
"""For the other ranks once one has failed; torchrun gives them 30 s."""

GPU_IS_THERE = Path("/proc/driver/nvidia/version").exists()
"""Then nothing is forked: importing bitsandbytes 0.50 asks for the card (`cuda_specs.py`), and no fork can use it then
any more."""

_SERVER = multiprocessing.get_context("forkserver")


def forked_launch(
    processes: int, arguments: Sequence[str], limit: float = 600, strategy: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch -m ARGUMENTS` with the shipped config of a strategy; waits for the end.

    Raises subprocess.TimeoutExpired after `limit` seconds; no rank outlives the call.
    """
    if GPU_IS_THERE:
        return accelerate_launch(processes, arguments, limit, strategy)
    command = launch_command(processes, arguments, strategy)
    with TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        environment = child_environment()
        launcher = _started(environment, _launch, command, environment, str(output))
        started = family(launcher.pid or 0)
        launcher.join(limit)
        if launcher.exitcode is None:
            kill_all(family(launcher.pid or 0))
            raise subprocess.TimeoutExpired(command, limit, output.read_text())
        kill_all(started)
        return subprocess.CompletedProcess(command, launcher.exitcode, output.read_text())


def forked_program(program: str, limit: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -c PROGRAM`, but that no interpreter ends: whatever registered for that is not called."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        environment = child_environment()
        process = _started(environment, _run_program, program, environment, [str(file) for file in files])
        process.join(limit)
        if process.exitcode is None:
            kill_all(family(process.pid or 0))
            raise subprocess.TimeoutExpired(program, limit, files[0].read_text(), files[1].read_text())
        return subprocess.CompletedProcess(program, process.exitcode, *(file.read_text() for file in files))


def _run_program(program: str, environment: dict[str, str], files: list[str]) -> None:
    _begin(environment, *files)
    exec(program, {"__name__": "__main__"})


def _begin(environment: Mapping[str, str], stdout: str, stderr: str) -> None:
    """Become, in a process that was forked off the server, what a new interpreter is."""
    for number, file in enumerate((stdout, stderr), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # It would be the server's own way of starting processes, in which each data worker imports everything anew.
    multiprocessing.set_start_method(None, force=True)


def _started(environment: Mapping[str, str], target: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process forked off the server; where it is the first, the server is started in this environment."""
    own = dict(os.environ)
    os.environ.update({**BEFORE_IMPORTS, **environment})
    try:
        _SERVER.set_forkserver_preload(["tests.helpers.distributed.preloaded"])
        process = _SERVER.Process(target=target, args=arguments)
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(own)
    return process


def _launch(command: list[str], environment: dict[str, str], output: str) -> None:
    """In the launcher: give each rank its environment and wait for all."""
    _begin(environment, output, output)
    arguments = command[command.index("-m", 2) + 1 :]
    environment, by_torchrun = _environment_of_accelerate(command[3:])
    size = int(command[command.index("--num_processes") + 1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = {}
    for rank in range(size):
        if not (pid := os.fork()):
            places = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "GROUP_RANK": 0,
            }
            of_rank = {name: str(value) for name, value in places.items()}
            of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
            _run_module(arguments, {**environment, **(of_rank if by_torchrun else {})})
        ranks[pid] = rank
    os._exit(_wait(ranks))


def _environment_of_accelerate(options: list[str]) -> tuple[dict[str, str], bool]:
    """What `accelerate launch` of these options would give to the processes that it starts (accelerate 1.15), and
    whether it would let torchrun start them: also one alone, where the strategy is one for several."""
    from accelerate.commands import launch

    parsed, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(options))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ""
        return dict(launch.prepare_deepspeed_cmd_env(parsed)[1]), True
    if parsed.use_fsdp or parsed.multi_gpu:
        return {**os.environ, **launch.prepare_multi_gpu_env(parsed)}, True
    return dict(launch.prepare_simple_launcher_cmd_env(parsed)[1]), False


def _run_module(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    code: object = 1
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)


def _wait(ranks: dict[int, int]) -> int:
    """The first code that is not 0. The others get a while to fail by themselves."""
    first, deadline = 0, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del ranks[pid]
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first, deadline = code, time.monotonic() + OTHERS_S
        elif time.monotonic() > deadline:
            kill_all([psutil.Process(other) for other in ranks])
            return first
        else:
            time.sleep(0.02)
    return first
