"""What happens to runs on a cluster: twelve kinds of event, each done to the attempt under way."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.run.directory import RunDirectory, request_stop
from launch.slurm import attempts as ledger
from launch.slurm.attempts import How
from launch.subprocesses import processes_with
from tests.slurm.cluster import Cluster, last_step, until_it_steps, wait


@dataclass(frozen=True)
class Scene:
    """A run under way. `job`: its id."""

    cluster: Cluster
    run: RunDirectory
    job: str

    def scontrol(self, *words: str) -> None:
        done = self.cluster.on("scontrol", *words)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Outcome:
    """An event: after which step it came, where the run went on, and so what it cost."""

    event: str
    announced: bool
    step: int
    reached: int
    went_on_at: int
    how: How | None  # the ledger's word; None: the run went on

    @property
    def lost(self) -> int:
        return self.reached - self.went_on_at


# events ----------------------------------------------------------------------------------------
# Each returns what to do once the attempt is over, or None.

After = Callable[[], None] | None


def requeue(scene: Scene) -> After:
    """The administrator."""
    scene.scontrol("requeue", scene.job)
    return None


def warning(scene: Scene) -> After:
    """The signal that --signal sends before the time limit."""
    assert scene.cluster.on("scancel", "--signal=USR1", "--batch", scene.job).returncode == 0
    return None


def preemption(scene: Scene) -> After:
    """A job of the partition `high` takes all nodes for a second."""
    nodes = len(scene.cluster.on("sinfo", "-h", "-N", "-p", "high").stdout.splitlines())
    words = ["--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    assert scene.cluster.on("sbatch", *words).returncode == 0
    return None


def stop_file(scene: Scene) -> After:
    """As the site's own script might ask."""
    request_stop(scene.run, "preempted")
    return None


def time_limit(scene: Scene) -> After:
    """The limit itself, without a warning: Slurm looks every 30 s, then sends TERM.

    Until then rank 0 is held: on a fast machine the run would be done by that time.
    """
    rank_0 = _trainers(scene)[0]
    scene.scontrol("update", f"JobId={scene.job}", "TimeLimit=1")
    rank_0.send_signal(signal.SIGSTOP)
    try:
        wait(scene.run.stop_file.exists, 200, lambda: scene.cluster.words_of(scene.run), pause=0.05)
    finally:
        rank_0.send_signal(signal.SIGCONT)
    return lambda: scene.scontrol("update", f"JobId={scene.job}", "TimeLimit=60")


def controller(scene: Scene) -> After:
    """slurmctld is killed, and comes back after a few steps: the run must not notice."""
    scene.cluster.control("kill-controller")
    before = last_step(scene.run)
    wait(lambda: last_step(scene.run) >= before + 3, 60, lambda: scene.cluster.words_of(scene.run))
    scene.cluster.control("start")
    return None


def rank(scene: Scene) -> After:
    """kill -9 of one rank."""
    _trainers(scene)[-1].send_signal(signal.SIGKILL)
    return None


def head_node(scene: Scene) -> After:
    """The node of rank 0 and of the batch script."""
    return _crash(scene, scene.cluster.nodes_of(scene.run)[0])


def other_node(scene: Scene) -> After:
    return _crash(scene, scene.cluster.nodes_of(scene.run)[-1])


def _crash(scene: Scene, node: str) -> After:
    scene.cluster.control("crash", node)
    return lambda: _heal(scene, node)


def cable(scene: Scene) -> After:
    """A node that lives on and is not heard of."""
    node = scene.cluster.nodes_of(scene.run)[-1]
    scene.cluster.control("link", node, "down")

    def plug() -> None:
        _until_missed(scene, node)
        scene.cluster.control("link", node, "up")
        scene.cluster.control("start")

    return plug


def full_disk(scene: Scene) -> After:
    """Room for the figures, not for the next save."""
    filler = scene.run.path.parent / "filler"
    free = shutil.disk_usage(filler.parent).free
    with filler.open("wb") as file:
        file.write(b"\0" * (free - 100 * 1024))
    return filler.unlink


def two_at_once(scene: Scene) -> After:
    """A rank is killed while the job is taken away."""
    scene.scontrol("requeue", scene.job)
    _trainers(scene)[0].send_signal(signal.SIGKILL)
    return None


def _trainers(scene: Scene) -> list[psutil.Process]:
    """The ranks of the attempt, rank 0 first: torchrun tells them theirs; their data workers are told the same."""
    found = []
    for process in processes_with([str(scene.run.path), "--marker-decides"]):
        parent = process.parent()
        if (number := process.environ().get("RANK")) and parent and "RANK" not in parent.environ():
            found.append((int(number), process))
    assert found, scene.cluster.words_of(scene.run)
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def _heal(scene: Scene, node: str) -> None:
    _until_missed(scene, node)
    scene.cluster.control("start")


def _until_missed(scene: Scene, node: str) -> None:
    """A node that is back before Slurm has missed it loses its next step too, when it registers."""
    wait(lambda: scene.cluster.is_down(node), 200, lambda: scene.cluster.on("sinfo", "-N").stdout)


ANNOUNCED: dict[str, Callable[[Scene], After]] = {
    "scontrol requeue": requeue,
    "USR1 to the batch script (scancel --signal)": warning,
    "preemption by the partition `high`": preemption,
    "STOP file": stop_file,
    "time limit": time_limit,
    "slurmctld killed": controller,
}
SUDDEN: dict[str, Callable[[Scene], After]] = {
    "kill -9 of one rank": rank,
    "crash of the head node": head_node,
    "crash of another node": other_node,
    "pulled cable": cable,
    "full disk during a save": full_disk,
    "two at once: requeue, and kill -9 of rank 0": two_at_once,
}
_NODE: tuple[How, ...] = ("node_fail", "crashed")  # the second where the other nodes notice before Slurm does
COUNTED: dict[str, tuple[How, ...]] = {
    **dict.fromkeys(SUDDEN, ("crashed",)),
    **dict.fromkeys(("crash of the head node", "crash of another node", "pulled cable"), _NODE),
    **dict.fromkeys(ANNOUNCED, ("preempted",)),
    "USR1 to the batch script (scancel --signal)": ("time",),
    "time limit": ("time",),
    "two at once: requeue, and kill -9 of rank 0": ("crashed", "preempted"),
}
"""As what the ledger counts each."""


def order(announced: Sequence[str], sudden: Sequence[str], seed: int) -> list[str]:
    """The events shuffled, announced and sudden in turn."""
    draw = random.Random(seed)
    first, second = draw.sample(announced, len(announced)), draw.sample(sudden, len(sudden))
    pairs = [word for pair in zip(first, second, strict=False) for word in pair]
    return [*pairs, *first[len(second) :], *second[len(first) :]]


def survive(
    cluster: Cluster, run: RunDirectory, events: Sequence[str], seed: int, steps: tuple[int, int] = (2, 5)
) -> list[Outcome]:
    """Do each event to the run in turn, so many `steps` after it went on."""
    job = ledger.read_ledger(run).job
    assert job is not None
    scene, draw, restart = Scene(cluster, run, job), random.Random(seed), 0
    outcomes = []
    for event in events:
        until_it_steps(cluster, run, restart, draw.randint(*steps))
        attempt, step = ledger.read_ledger(run).open, last_step(run)
        assert attempt is not None, cluster.words_of(run)
        act = ANNOUNCED.get(event) or SUDDEN[event]
        after = act(scene)
        if act is controller:
            assert ledger.read_ledger(run).open == attempt, cluster.words_of(run)
            outcomes.append(Outcome(event, True, step, step, step, None))
            continue
        restart = attempt.restart + 1
        reached, went_on = _until_another_attempt(scene, restart, after)
        (how,) = [found.how for found in ledger.read_ledger(run).attempts if found.restart == attempt.restart]
        outcomes.append(Outcome(event, event in ANNOUNCED, step, reached, went_on, how))
        print(outcomes[-1], flush=True)
    return outcomes


def _until_another_attempt(scene: Scene, restart: int, after: After) -> tuple[int, int]:
    """(last step of the attempt that ended, step that the next one goes on at)."""
    cluster, run, left, reached = scene.cluster, scene.run, after, 0

    def started() -> bool:
        nonlocal left, reached
        step = last_step(run)
        attempts = ledger.read_ledger(run).attempts
        if attempts and attempts[-1].restart >= restart:
            return True
        reached = step  # read before the next attempt forgets the steps that it will take again
        if left and cluster.job(scene.job).state not in ("RUNNING", "COMPLETING"):
            # However long the repair takes: on a fast machine the run would be done by then.
            cluster.on("scontrol", "hold", scene.job)
            left()
            cluster.on("scontrol", "release", scene.job)
            left = None
        return False

    wait(started, 400, lambda: cluster.words_of(run))
    if left:
        left()
    (attempt,) = [found for found in ledger.read_ledger(run).attempts if found.restart == restart]
    return reached, attempt.first_step


def mounted(folder: Path, megabytes: int) -> None:
    """A disk of its own, small enough to be filled; before the cluster starts, so that its nodes see it."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)


def unmounted(folder: Path) -> None:
    for _ in range(50):
        if subprocess.run(["umount", str(folder)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.2)
