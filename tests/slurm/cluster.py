"""The test cluster in Python: start it, submit to it, look at a run, wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launching import ROOT, child_environment
from launch.resources import resource
from launch.run.directory import RunDirectory
from launch.slurm import attempts
from launch.slurm.output import JobFacts, parse_job

SCRIPT = Path(__file__).with_name("cluster.sh")
EMBEDDED = {
    "batch.global_batch_size": 8,
    "checkpoint.every_steps": 4,
    "evaluation.every_steps": 4,
    "evaluation.max_samples": 16,
    "tracking.report_to": "none",
    "training.learning_rate": 2e-4,
    "training.logging_steps": 1,
}
"""What makes the embedded recipe short: steps of a third of a second.

The rate is the 7B recipe's. At its own, twenty times as high, the rounding of another number of processes alone moves
adapters by 1.4e-5 in 8 steps.
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster and the folder of its runs."""

    folder: Path
    runs: Path

    def control(self, command: str, *words: str) -> str:
        """A command of cluster.sh."""
        done = subprocess.run(
            [str(SCRIPT), command, str(self.folder), *words],
            capture_output=True,
            text=True,
            check=False,
            env=self._environment(),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def on(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        words = [str(SCRIPT), "on", str(self.folder), *command]
        return subprocess.run(
            words, capture_output=True, text=True, check=False, env=self._environment(), cwd=ROOT
        )

    def _environment(self) -> dict[str, str]:
        return {**child_environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def samestep(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command of this checkout, on the login node."""
        return self.on(sys.executable, "-P", "-m", "launch.cli.main", *words)

    def submit(self, name: str, *words: str, steps: int = 8, **site: Any) -> RunDirectory:
        """Submit the embedded recipe for nodes without GPUs."""
        done = self.try_to_submit(name, *words, steps=steps, **site)
        assert done.returncode == 0, done.stdout + done.stderr
        return RunDirectory(self.runs / name)

    def try_to_submit(
        self, name: str, *words: str, steps: int = 8, **site: Any
    ) -> subprocess.CompletedProcess[str]:
        file = self.runs / f"{name}.site.yaml"
        values = {"device": "cpu", "cpus_per_process": 1, "time": "1:00:00", **site}
        file.write_text(json.dumps(values))
        place = ["--runs-dir", str(self.runs), "--name", name, "--site", str(file)]
        return self.samestep("submit", "embedded", *place, *overrides(steps), *words)

    def job(self, job: str) -> JobFacts:
        """What Slurm says of a job; asked again while the controller is away."""
        found: list[JobFacts] = []

        def answered() -> bool:
            facts = parse_job(self.on("scontrol", "show", "job", "-o", job).stdout, job)
            found.extend([facts] if facts else [])
            return facts is not None

        wait(answered, 200, lambda: f"no answer about job {job}")
        return found[0]

    def until_gone(self, run: RunDirectory, limit: float = 400) -> str:
        """Wait until the run's job is neither queued nor running; returns its last state."""
        job = attempts.read_ledger(run).job
        assert job is not None
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait(lambda: self.job(job).state in over, limit, lambda: self.words_of(run), pause=1)
        return self.job(job).state

    def words_of(self, run: RunDirectory) -> str:
        """The job's log and the ledger, for a message."""
        logs = "".join(file.read_text() for file in sorted((run.path / "logs").glob("*.out")))
        book = attempts.ledger_file(run)
        return f"{logs}\n{book.read_text() if book.exists() else 'no ledger'}\n{self.on('squeue').stdout}"

    def is_down(self, node: str) -> bool:
        """Slurm has missed a node. Of one alone it might not say so: see `states` in cluster.sh."""
        return f"n{node} down" in self.on("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").stdout

    def nodes_of(self, run: RunDirectory) -> list[str]:
        """Numbers of the nodes of the attempt under way, the head first."""
        attempt = attempts.read_ledger(run).open
        assert attempt is not None
        return [name[1:] for name in self.on("scontrol", "show", "hostnames", attempt.nodes).stdout.split()]


def template_by_hand(folder: Path, runs: Path, name: str, steps: int) -> Path:
    """The template with its EDIT lines changed as somebody does who reads them; `name` of the run, as bash reads it."""
    text = resource("slurm", "train.sbatch").read_text()
    options = " ".join(["--name", name, "--runs-dir", str(runs), *overrides(steps)])
    for line, edited in (
        (r"PYTHON=.*", f"PYTHON={sys.executable}"),
        (r"OPTIONS=.*", f"OPTIONS=({options})"),
        (r"DEVICE=.*", "DEVICE=cpu"),
        (r"#SBATCH --gpus-per-node.*\n", ""),
        (r"#SBATCH --cpus-per-task=8.*", "#SBATCH --cpus-per-task=2"),
        (r"#SBATCH --output=.*", f"#SBATCH --output={folder}/hand-%j.out"),
    ):
        text, count = re.subn(rf"^{line}", lambda _, edited=edited: edited, text, flags=re.MULTILINE)
        assert count == 1, line
    (folder / "train.sbatch").write_text(text)
    return folder / "train.sbatch"


def overrides(steps: int) -> list[str]:
    """Command line of the short embedded recipe."""
    values = {**EMBEDDED, "training.max_steps": steps}
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def start(folder: Path, runs: Path, nodes: int, mode: str = "loopback") -> Cluster:
    """Start a cluster; `mode`: `netns` gives every node its own network."""
    runs.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, runs)
    try:
        cluster.control("start", str(nodes), mode)
    except AssertionError:
        cluster.control("stop")
        raise
    return cluster


def wait(condition: Callable[[], bool], limit: float, words: Callable[[], str], pause: float = 0.2) -> None:
    """Look until it holds; fail with `words` after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit} s in vain\n{words()}"
        time.sleep(pause)


def last_step(run: RunDirectory) -> int:
    """Of the newest complete line of the metrics."""
    try:
        lines = run.metrics_file.read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps: list[int] = []
    for line in lines[-2:]:
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            continue
    return steps[-1] if steps else 0


def until_it_steps(cluster: Cluster, run: RunDirectory, restart: int, steps: int) -> None:
    """Wait until the attempt with this number has taken steps of its own."""

    def stepped() -> bool:
        attempt = attempts.read_ledger(run).open
        if attempt is None or attempt.restart < restart or not run.metrics_file.exists():
            return False
        of_now = run.metrics_file.stat().st_mtime > attempt.began + 2
        return of_now and last_step(run) >= attempt.first_step + steps

    wait(stepped, 400, lambda: cluster.words_of(run), pause=0.05)


def train_here(name: str, runs: Path, processes: int, steps: int) -> RunDirectory:
    """The same recipe on this machine, without Slurm."""
    words = ["--runs-dir", str(runs), "--name", name, "--gpus-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli.main", "run", "embedded", *words, *overrides(steps)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDirectory(runs / name)


def missing() -> Sequence[str]:
    """What this machine lacks for a cluster."""
    from shutil import which

    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [
        name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if not which(name, path=path)
    ]
    return [*lacking, *([] if os.geteuid() == 0 else ["root"])]
