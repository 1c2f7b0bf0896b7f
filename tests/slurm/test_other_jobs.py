"""Jobs that are several, inside of others, or on nodes that fail: our scripts and a stand-in for the trainer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.run.directory import RunDirectory, clear_requests, read_marker, request_stop
from launch.slurm import attempts
from tests.slurm.cluster import Cluster, template_by_hand, wait

pytestmark = pytest.mark.slurm


def _by_hand(cluster: Cluster, trainer: Path, name: str, *options: str, inside: tuple[str, ...] = ()) -> str:
    """Submit the template as it is, edited; the job's id."""
    script = template_by_hand(trainer.parent, cluster.runs, name, 8)
    script.write_text(script.read_text().replace(f"PYTHON={sys.executable}", f"PYTHON={trainer}"))
    done = cluster.on(*inside, "sbatch", "--parsable", *options, str(script), "recipes/embedded.yaml")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _ends(run: RunDirectory, job: str) -> list[tuple[int, str | None]]:
    return [(one.restart, one.how) for one in attempts.read_ledger(run).attempts if one.job == job]


def test_what_happens_to_a_task_of_an_array_happens_to_no_other(cluster: Cluster, trainer: Path) -> None:
    """Tasks 0 and 2 want the same run. Task 2 has the id of the array."""
    name = '"array-$((SLURM_ARRAY_TASK_ID % 2))"'
    array = _by_hand(cluster, trainer, name, "--array=0-2")
    even, odd = (RunDirectory(cluster.runs / f"array-{number}") for number in (0, 1))

    def says() -> str:
        logs = "".join(file.read_text() for file in sorted(trainer.parent.glob("*.out")))
        return f"{logs}\n{attempts.read_ledger(even)}\n{attempts.read_ledger(odd)}\n{cluster.on('squeue').stdout}"

    wait(lambda: len(attempts.read_ledger(even).attempts) == 2, 60, says)
    first, second = sorted(attempts.read_ledger(even).attempts, key=lambda one: one.how == "refused")
    assert {first.job, second.job} == {f"{array}_0", f"{array}_2"}, says()
    assert (second.how, f"job {first.job} of this run is under way" in second.reason) == ("refused", True), (
        says()
    )
    assert "tasks of an array need runs of their own" in second.reason
    wait(lambda: attempts.read_ledger(odd).open is not None, 60, says)
    # The warning of the end comes to one, and its sibling is cancelled.
    assert cluster.on("scancel", "--signal=USR1", "--batch", first.job).returncode == 0
    assert cluster.on("scancel", f"{array}_1").returncode == 0
    wait(lambda: cluster.job(f"{array}_1").state == "CANCELLED", 60, says)
    wait(lambda: _ends(even, first.job) == [(0, "time"), (1, None)], 60, says)
    (even.path / "enough").touch()
    wait(lambda: cluster.job(first.job).state == "COMPLETED", 60, says)
    assert _ends(even, first.job) == [(0, "time"), (1, "done")], says()
    assert _ends(odd, f"{array}_1") == [(0, "stopped")], says()
    assert _ends(even, second.job) == [(0, "refused")], says()
    assert cluster.job(second.job).state == "FAILED"


def test_a_job_that_is_submitted_inside_of_another_gets_what_it_asks_for(
    cluster: Cluster, trainer: Path
) -> None:
    inside = ("salloc", "--ntasks=1", "--gpus-per-task=2", "--mem=100")
    hand = RunDirectory(cluster.runs / "inside")
    hand.path.mkdir()
    (hand.path / "enough").touch()
    plain = _by_hand(cluster, trainer, "inside", "--nodes=2", inside=inside)
    run = cluster.submit("inside-submitted", "--nodes", "2", python=str(trainer), options=["--hold"])
    (run.path / "enough").touch()
    again = cluster.on(*inside, "sbatch", "--parsable", str(run.path / "submit.sbatch")).stdout.strip()
    cluster.on("scontrol", "release", again)
    for job, whose in ((plain, hand), (again, run)):
        wait(
            lambda job=job: cluster.job(job).state == "COMPLETED",
            60,
            lambda whose=whose: cluster.words_of(whose),
        )
        assert _ends(whose, job) == [(0, "done")], cluster.words_of(whose)
    assert "rror" not in "".join(file.read_text() for file in trainer.parent.glob("*.out"))
    cluster.on("scancel", attempts.read_ledger(run).submitted[0])


def test_a_node_that_failed_is_left_out_of_the_next_attempt(cluster: Cluster, trainer: Path) -> None:
    run = cluster.submit("without", "--nodes", "2", python=str(trainer))
    wait(lambda: attempts.read_ledger(run).open is not None, 60, lambda: cluster.words_of(run))
    node = f"n{cluster.nodes_of(run)[-1]}"
    (run.path / "lost").touch()
    cluster.control("crash", node[1:])
    cluster.on("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    wait(lambda: attempts.read_ledger(run).open is None, 60, lambda: cluster.words_of(run))
    cluster.control("start")  # it is back before the job is, which would get it again
    wait(lambda: len(attempts.read_ledger(run).attempts) == 2, 60, lambda: cluster.words_of(run))
    first, second = attempts.read_ledger(run).attempts
    assert (first.how, first.failed_nodes) == ("node_fail", node), cluster.words_of(run)
    assert f"{node} idle" in cluster.on("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").stdout
    assert node not in [f"n{name}" for name in cluster.nodes_of(run)], cluster.words_of(run)
    assert cluster.job(second.job).excluded == (node,)
    (run.path / "enough").touch()
    assert cluster.until_gone(run, 60) == "COMPLETED", cluster.words_of(run)


def test_a_stop_of_the_user_holds_when_slurm_queues_the_job_again_right_then(
    cluster: Cluster, trainer: Path
) -> None:
    run = cluster.submit("stopped-and-requeued", "--nodes", "2", python=str(trainer))
    (job,) = attempts.read_ledger(run).submitted
    wait(lambda: attempts.read_ledger(run).open is not None, 60, lambda: cluster.words_of(run))
    request_stop(run, "user")
    wait(lambda: read_marker(run) is not None, 60, lambda: cluster.words_of(run), pause=0.02)
    clear_requests(run)  # as the trainer does, which has answered
    assert cluster.on("scontrol", "requeue", job).returncode == 0
    wait(lambda: len(_ends(run, job)) == 2, 120, lambda: cluster.words_of(run))
    wait(lambda: cluster.job(job).state == "FAILED", 60, lambda: cluster.words_of(run))
    assert _ends(run, job) == [(0, "stopped"), (1, "refused")], cluster.words_of(run)
    assert "queued again by Slurm alone" in cluster.words_of(run)
