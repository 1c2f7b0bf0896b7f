"""`python -m trainer.launcher ARGUMENTS`: `accelerate launch ARGUMENTS` for a program that waits for it.

What a launcher by itself does not do: it ends when whoever waits for it is gone, and when a stop is wanted while it
still waits for other machines. Where all processes are on this machine, nobody else can reach their store. One plain
process starts without accelerate's imports (`trainer.single_process`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from launch.console import log_stderr
from launch.launcher_variables import MARKER_DECIDES, PARENT
from launch.run.directory import RunDirectory, leave_stopped, requested_stop
from launch.run.lock import lock_holder
from trainer import WATCHDOG
from trainer.garbage import resume_collection
from trainer.single_process import without_accelerate
from trainer.watchdog import OTHERS_PATIENCE_S, PATIENCE_S

LOOPBACK = "127.0.0.1"


def main() -> None:
    """Entry point: the command line is accelerate's."""
    arguments = sys.argv[1:]
    os.environ[PARENT] = str(os.getpid())
    WATCHDOG.spares_children = True  # they notice, and stop in good order where they can
    folder = value_of("--run-dir", arguments)
    if (
        folder and MARKER_DECIDES in arguments
    ):  # not those that evaluate a run, which a STOP file does not mean
        watch_stops(RunDirectory(Path(folder)), is_first=value_of("--machine_rank", arguments) in (None, "0"))
    if one := without_accelerate(arguments, os.environ):
        resume_collection()
        sys.exit(run_one(*one))
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    resume_collection()
    if value_of("--num_machines", arguments) in (None, "1"):
        listen_on_loopback()
    # What torchrun says of ranks that fail or are stopped, they say themselves, or `explain` does.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch.main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SignalException as error:  # how torchrun ends of a signal, which is no error of its own
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        sys.exit(explain({rank: failure.exitcode for rank, failure in error.failures.items()}))
    except subprocess.CalledProcessError as error:
        sys.exit(explain({0: error.returncode}))


def run_one(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the only process of a run. Returns the exit status of this launcher."""
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it was interrupted too, and ends by itself
        return 130
    return explain({0: status}) if status else 0


def explain(exit_statuses: Mapping[int, int]) -> int:
    """Return the exit status for failed ranks. One that ends with 1 or 2 has said why; for any other it is said here.

    torchrun and accelerate raise what failed: its traceback would stand over what the ranks said.
    """
    for rank, status in sorted(exit_statuses.items()):
        if status < 0:
            log_stderr(f"rank {rank}: was ended by signal {-status} ({signal.strsignal(-status)})")
        elif status not in (1, 2):
            log_stderr(f"rank {rank}: ended with status {status}")
    return 2 if 2 in exit_statuses.values() else 1


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """Return what follows an option on the command line."""
    return arguments[arguments.index(option) + 1] if option in arguments else None


def watch_stops(run: RunDirectory, is_first: bool) -> None:
    """End when a stop is wanted and there is no process here yet that could answer it."""

    def wanted(_: bytes) -> str | None:
        reason = requested_stop(run)
        return reason if reason and not psutil.Process().children() else None

    def give_up(reason: str) -> None:
        if is_first and lock_holder(run.path) is None:
            leave_stopped(run, reason)

    patience = PATIENCE_S if is_first else OTHERS_PATIENCE_S
    WATCHDOG.answer_stops(wanted, give_up, orderly=False, patience=patience)


def listen_on_loopback() -> None:
    """Let torchrun's store be reached from this machine alone.

    PyTorch 2.14's `TCPStore` listens on every interface, whatever its address; given a socket that is bound already,
    it takes that. Without `static_tcp_rendezvous.TCPStore`, which torchrun makes its store with, nothing is changed.
    """
    rendezvous: Any = import_module("torch.distributed.elastic.rendezvous.static_tcp_rendezvous")
    store = rendezvous.TCPStore

    def on_loopback(
        host: str, port: int, world_size: int, is_master: bool, *more: Any, **options: Any
    ) -> Any:
        if is_master and host == LOOPBACK:
            options["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
        return store(host, port, world_size, is_master, *more, **options)

    rendezvous.TCPStore = on_loopback


if __name__ == "__main__":
    main()
