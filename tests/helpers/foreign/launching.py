"""Starts the scripts of this folder, as `torchrun` would, but with the libraries loaded once and then forked.

Not by `tests.helpers.distributed.forked`, whose ranks have accelerate's environment: these are plain library code, with
DeepSpeed imported for a CPU.

python -m tests.helpers.foreign.launching BASE OUTPUT
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = {
    "tests.helpers.foreign.write_fsdp": 2,
    "tests.helpers.foreign.write_zero": 3,
}  # 3: what is cut into 3 is padded


def write_foreign_checkpoints(base: Path, output: Path) -> None:
    """Run this module in a process of its own; fails with its words."""
    command = [sys.executable, "-m", "tests.helpers.foreign.launching", str(base), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def _rank(script: str, rank: int, world_size: int, port: int, base: str, output: str) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(world_size)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    importlib.import_module(script).write(base, Path(output))


def main() -> int:
    """Every script on its ranks, one after the other; returns 1 when a rank failed."""
    for script, world_size in SCRIPTS.items():
        importlib.import_module(script)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        arguments = [(script, rank, world_size, port, *sys.argv[1:]) for rank in range(world_size)]
        ranks = [context.Process(target=_rank, args=each) for each in arguments]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
