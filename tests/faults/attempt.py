"""One `samestep run` of a chain: its processes, its moments, how it is struck and how it is seen to be over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.launching import ROOT, child_environment
from launch.run.directory import RunDirectory
from tests.faults.drawing import Fault
from tests.helpers.distributed.launching import published_steps

MARK = "SAMESTEP_FAULT_CHAIN"
"""In the environment of every process of a chain, whoever its parent is."""

LAUNCHERS = {"trainer.launcher", "accelerate.commands.launch"}
"""How a launcher is called, of those that a run starts."""

LARGEST_FILE = 20_000  # bytes; the moments of the tiny adapter take 32 kB
SMALL_SHM = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "
OTHER_LAUNCHER = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "198.51.100.1",  # of a network kept for examples: nobody answers
    "MASTER_PORT": "29511",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "TORCHELASTIC_RUN_ID": "other",
}


class Attempt:
    """A started command. Everything of it carries `mark`; its words go to a file of its own."""

    def __init__(
        self,
        command: Sequence[str],
        run: RunDirectory,
        mark: str,
        log: Path,
        cache: Path,
        condition: str = "",
    ) -> None:
        self.run, self.mark, self.log, self.condition = run, mark, log, condition
        self.resumed_at = max(published_steps(run.path), default=0)
        self.began = time.time()
        environment = {**run_environment(cache), MARK: mark}
        if condition.startswith("environment"):
            environment |= OTHER_LAUNCHER
        words = list(command)
        if condition.startswith("/dev/shm"):
            words = ["unshare", "--mount", "sh", "-c", f'{SMALL_SHM} "$@"', "sh", *words]
        if condition.startswith("files"):
            words = ["prlimit", f"--fsize={LARGEST_FILE}", *words]
        with log.open("ab") as output:
            self.top = subprocess.Popen(
                words,
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def alive(self) -> list[int]:
        """Every process of the chain that is left, by its mark."""
        self.top.poll()
        return [pid for pid in _processes() if _environment(pid).get(MARK) == self.mark]

    def ended(self) -> bool:
        """The command has ended and nothing of it is left."""
        return self.top.poll() is not None and not self.alive()

    def stepped(self) -> bool:
        """It has taken a step of its own, or found all of them taken."""
        return self.steps_taken() > 0

    def steps_taken(self) -> int:
        """Steps beyond the checkpoint that it went on from, as far as the figures say."""
        with suppress(OSError, ValueError, IndexError):
            if self.run.metrics_file.stat().st_mtime > self.began:
                last = json.loads(self.run.metrics_file.read_text().splitlines()[-1])
                return int(last["step"]) - self.resumed_at
        return 0

    def born(self, fault: Fault) -> bool:
        """What the fault's moment is counted from is there: its victim, or the ranks."""
        return bool(self.victims(replace(fault, target="rank") if fault.phase == "importing" else fault))

    def victims(self, fault: Fault) -> list[int]:
        """The processes that a fault is meant for, as far as they have been born."""
        found = {pid: _arguments(pid) for pid in self.alive()}
        launchers = [pid for pid, words in found.items() if LAUNCHERS & {*words}]
        trainers = [pid for pid, words in found.items() if "trainer.train" in words and pid not in launchers]
        ranks = [pid for pid in trainers if _parent(pid) not in trainers]
        loaders = [pid for pid in trainers if pid not in ranks]
        ranks.sort(key=lambda pid: int(_environment(pid).get("RANK", "0")))
        chosen = {
            "top": [self.top.pid] if self.top.poll() is None else [],
            "launcher": launchers[:1],
            "rank": _one_of(ranks, fault.share),
            "data worker": _one_of(loaders, fault.share),
            "all": [*ranks, *sorted(found.keys() - {*ranks})] if launchers or fault.phase == "start" else [],
        }
        return chosen[fault.target or "top"]

    def reached(self, fault: Fault, born: float) -> bool:
        """It is the moment of the fault. `born`: when its victim was first seen."""
        if fault.phase in ("start", "importing"):
            return time.time() - born >= fault.seconds
        if fault.phase == "meeting":
            return "world size" in self.log.read_text(errors="replace") or any(
                _has_connections(pid) for pid in self.victims(fault)
            )
        if self.steps_taken() < min(fault.ahead, 5):
            return False
        return fault.phase == "steps" or any(self.run.path.glob("checkpoint-*.partial"))

    def names(self) -> list[str]:
        """What is left, in words."""
        return [f"{pid} {' '.join(_arguments(pid))[:80]}" for pid in self.alive()]

    def end(self) -> None:
        """Kill whatever is left, stopped or not."""
        deadline = time.monotonic() + 30
        while left := self.alive():
            send(left, signal.SIGKILL)
            assert time.monotonic() < deadline, f"{left}: cannot be killed"
            time.sleep(0.05)
        self.top.wait()


def send(pids: Sequence[int], number: signal.Signals) -> bool:
    """A signal to each that is still there; returns whether there was one."""
    found = False
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            found = True
    return found


def run_environment(cache: Path) -> dict[str, str]:
    """Of `samestep run`: a cache of its own."""
    return {**child_environment(), "SAMESTEP_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def run_command(recipe: Path, runs: Path, name: str, strategy: str, processes: int) -> list[str]:
    """`samestep run`, as a user types it."""
    command = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "run",
        str(recipe),
        "--runs-dir",
        str(runs),
        "--name",
        name,
    ]
    return [*command, "--strategy", strategy, "--gpus-per-node", str(processes)]


def _one_of(pids: Sequence[int], share: float) -> list[int]:
    return [pids[int(share * len(pids))]] if pids else []


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _environment(pid: int) -> dict[str, str]:
    """Empty for one that is over and not yet waited for."""
    pairs = (entry.partition("=") for entry in _read(pid, "environ").split("\0"))
    return {name: value for name, _, value in pairs}


def _arguments(pid: int) -> list[str]:
    return _read(pid, "cmdline").split("\0")


def _parent(pid: int) -> int:
    return int((_read(pid, "stat").rpartition(")")[2].split() or ["", "0"])[1])


def _has_connections(pid: int) -> bool:
    """It has a socket: what a rank opens first is the one to the others."""
    with suppress(OSError):
        return any(str(entry.readlink()).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False
