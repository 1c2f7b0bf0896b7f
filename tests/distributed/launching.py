"""Real launches for the tests: `accelerate launch` as a user types it, and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def accelerate_launch(
    processes: int,
    arguments: Sequence[str],
    *,
    kill_when: Callable[[], bool] | None = None,
    limit: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch ... -m ARGUMENTS` with the shipped config; with `kill_when`, kill -9 all of it then."""
    config = ROOT / "accelerate_configs" / ("ddp.yaml" if processes > 1 else "single.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "-m", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if kill_when is not None:
        deadline = time.monotonic() + limit
        while process.poll() is None and not kill_when() and time.monotonic() < deadline:
            time.sleep(0.01)
    killed = kill_when is not None and process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert killed == (kill_when is not None), f"ended before it could be killed:\n{output}"
    return subprocess.CompletedProcess(command, process.returncode, output)


def drive(
    processes: int,
    requests: Sequence[Sequence[str]],
    folder: Path,
    *,
    kill_when: Callable[[], bool] | None = None,
) -> str:
    """Several runs of `trainer.train` in one launch; fails the test when one of them fails. Returns the output."""
    file = folder / f"requests-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(requests))
    done = accelerate_launch(processes, ["tests.distributed.drive", str(file)], kill_when=kill_when)
    assert kill_when is not None or done.returncode == 0, done.stdout
    return done.stdout
