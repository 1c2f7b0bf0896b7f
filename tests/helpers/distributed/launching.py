"""Real launches for the tests: `accelerate launch` as a user types it, and what kills it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.launching import ROOT, child_environment, family, kill_all
from tests.helpers.distributed.forked import forked_launch


def machine_command(recipe: Path, options: Sequence[str], *, rank: int, nodes: int, port: int) -> list[str]:
    """`samestep run` on one of several machines, all of them on loopback; the run lies beside its recipe."""
    command = [sys.executable, "-m", "launch.cli.main", "run", str(recipe), "--runs-dir", str(recipe.parent)]
    command += [*options, "--nodes", str(nodes), "--machine-rank", str(rank)]
    return [*command, "--main-process-ip", "127.0.0.1", "--main-process-port", str(port)]


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command with its output in `log`, in a session of its own; nothing of it outlives the block."""
    environment = child_environment()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        kill_all(family(process.pid))
        process.wait()


def workers(pid: int) -> list[psutil.Process]:
    """The ranks below a launcher, rank 0 first; not their data workers."""
    with suppress(psutil.NoSuchProcess):
        found = [(_rank(child), child) for child in psutil.Process(pid).children()]
        return [child for rank, child in sorted(found, key=lambda pair: pair[0]) if rank >= 0]
    return []


def launcher_of(pid: int) -> int:
    """The launcher that a `samestep run` waits for."""
    (launcher,) = psutil.Process(pid).children()
    return int(launcher.pid)


def _rank(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.environ().get("RANK", "0"))
    return -1


def wait_until(condition: Callable[[], bool], limit: float = 240, pause: float = 0.01) -> None:
    """Look until it holds; fail the test after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def drive(
    processes: int,
    requests: Sequence[tuple[Sequence[str], int | None]],
    folder: Path,
    limit: float = 600,
    strategy: str | None = None,
) -> str:
    """Several runs of `trainer.train` in one launch, each with the step to stop at or None; returns the output."""
    file = folder / f"requests-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(requests))
    done = forked_launch(processes, ["tests.helpers.distributed.drive", str(file)], limit, strategy)
    assert done.returncode == 0, done.stdout
    return done.stdout


def published_steps(run: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first; not of those on their way out."""
    found = (
        re.fullmatch(r"checkpoint-(\d+)", file.parent.name) for file in run.glob("checkpoint-*/manifest.json")
    )
    return sorted(int(match[1]) for match in found if match)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C to one process."""
    process.send_signal(signal.SIGINT)
