"""The processes of one machine: how they are started, asked to stop, waited for and believed.

`accelerate launch` starts and ends the ranks. What it does not do stands here: a stop at a step boundary, children of
a launcher that was killed, and an ending that is read from the run's marker instead of an exit status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from launch.console import log_stderr
from launch.errors import ConfigError, RunError
from launch.hardware import first_visible_gpu
from launch.inputs.caches import config_file
from launch.launcher_variables import MARKER_DECIDES
from launch.local.accelerate_command import Layout, cpu_threads_of, free_port, launch_command
from launch.local.bytecode import bytecode_variables
from launch.local.read_ahead import reading_ahead
from launch.planning.plan import Plan
from launch.recipe.loading import load_recipe
from launch.resources import resource
from launch.run.directory import (
    Marker,
    RunDirectory,
    clear_requests,
    read_marker,
    reason_of_sigterm,
    request_stop,
)
from launch.run.local_log import add_to_log
from launch.run.lock import lock_holder, refuse_if_running
from launch.strategies import STRATEGIES
from launch.subprocesses import PYTHON_VARIABLES, STARTED, processes_with, wait_for

LINGERING_S = 6.0
LEFT_PATIENCE_S = 900.0  # longer than the patience of any trainer with itself


@dataclass(frozen=True)
class Machine:
    """Which of several machines this is, and where the first is found. Defaults: there is only this one."""

    nodes: int = 1
    rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None


ALONE = Machine()


def launch(plan: Plan, run: RunDirectory, machine: Machine) -> Marker:
    """Start this machine's processes of a run that is written, wait, and believe the marker: DONE, STOPPED are success.

    The launcher's status is no evidence: accelerate 1.15 returns 1 after workers that all ended well. A request to
    stop becomes a STOP file, so that no signal has to cross the launcher; a second Ctrl-C ends all at once.
    Returns the marker. Raises ConfigError for REFUSED or when another trainer took the run first, RunError when
    there is no marker, KeyboardInterrupt after that second Ctrl-C.
    """
    command, began = run_command(plan, run, machine), time.time()
    with reading_ahead(_base_folder(run)):
        ended = wait_for(command, child_environment(plan), ask_to_stop(run))
    if not ended.killed:
        wait_for_trainer(run)
    marker = read_marker(run)
    if marker is not None and marker.kind in ("DONE", "STOPPED"):
        return marker
    if ended.killed or lock_holder(run.path) is None:
        clear_requests(run)  # of an attempt that is over and did not answer them
    if ended.killed:
        raise KeyboardInterrupt
    if marker is not None:
        raise ConfigError(marker.text or f"{run.path}: refused without a reason; see the words above")
    # On another machine the lock is the first one's, whose trainer may end a little later.
    if machine.rank == 0:
        refuse_if_running(run)  # another trainer, to which ours gave way without a marker
    add_to_log(run, f"the launcher ended with exit status {ended.status}; no marker was written", began)
    raise RunError(
        f"{run.path}: ended before it was done; see the words above, the same command goes on "
        "from the newest checkpoint"
    )


def _base_folder(run: RunDirectory) -> Path | None:
    config = config_file(load_recipe(run.recipe_file))
    return config and config.parent


def ask_to_stop(run: RunDirectory) -> Callable[[int], None]:
    """What `wait_for` does about a signal: one STOP file, and a word to whoever pressed Ctrl-C."""

    def ask(number: int) -> None:
        request_stop(run, reason_of_sigterm() if number == signal.SIGTERM else "user")
        log_stderr("stopping at the next step boundary; Ctrl-C again ends at once")

    return ask


def wait_for_trainer(run: RunDirectory) -> None:
    """A launcher that is killed leaves its trainers: ask them to stop at the next step boundary, wait until they did.

    They are known by their command line: one that still imports holds no lock and does not know that it is alone.
    Each ends by itself when it does not get there (trainer/watchdog.py); one that is frozen is killed in the end.
    """
    words, stop_requested, killed, began = [str(run.path), MARKER_DECIDES], False, False, time.monotonic()
    with _asking_meanwhile(run):
        while left := processes_with(words):
            waited = time.monotonic() - began
            # Data workers have the same command line and notice within 5 s that their trainer died.
            if not stop_requested and waited > LINGERING_S:
                stop_requested = True
                if read_marker(run) is None:
                    with contextlib.suppress(OSError):
                        request_stop(run, "orphaned")
                log_stderr(
                    f"{run.path}: the launcher has ended, waiting for its processes; Ctrl-C ends them at once"
                )
            if waited > LEFT_PATIENCE_S:
                if not killed:  # said once: one that waits for a disk ends when that is back
                    log_stderr(f"{run.path}: {len(left)} processes did not end in {waited:.0f} s, killed")
                killed = True
                _kill(left)
            time.sleep(0.2)


@contextlib.contextmanager
def _asking_meanwhile(run: RunDirectory) -> Iterator[None]:
    """A Ctrl-C kills the trainers that are left; any other request to stop goes to them, and is waited for."""
    ask = ask_to_stop(run)

    def receive(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            ask(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, receive)
        yield
    except KeyboardInterrupt:
        _kill(processes_with([str(run.path), MARKER_DECIDES]))
        raise
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _kill(trainers: Sequence[psutil.Process]) -> None:
    for trainer in trainers:
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.kill()


def run_command(plan: Plan, run: RunDirectory, machine: Machine) -> list[str]:
    """argv of a machine's launcher for a run that is written."""
    arguments = ["--run-dir", str(run.path), MARKER_DECIDES]
    return trainer_command(plan, "trainer.train", arguments, machine)


def trainer_command(
    layout: Layout,
    module: str,
    arguments: Sequence[str],
    machine: Machine = ALONE,
) -> list[str]:
    """argv that starts a trainer module on a machine's processes of a layout."""
    return launch_command(
        layout,
        config_file=resource("accelerate_configs", STRATEGIES[layout.strategy].config_file),
        module=module,
        module_args=arguments,
        port=machine.main_process_port or free_port(),
        machine_rank=machine.rank,
        main_process_ip=machine.main_process_ip or "127.0.0.1",
        cpu_threads=cpu_threads_of(layout),
    )


def child_environment(layout: Layout) -> dict[str, str]:
    """The environment of the launcher. One process sees one GPU: Trainer would spread over all it sees."""
    extra = (
        {"CUDA_VISIBLE_DEVICES": first_visible_gpu()}
        if STRATEGIES[layout.strategy].is_one_process and layout.device == "cuda"
        else {}
    )
    extra |= bytecode_variables(os.environ) | PYTHON_VARIABLES
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", STARTED: str(time.time()), **extra}
