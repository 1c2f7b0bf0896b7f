"""Several jobs of one run: the first that starts takes it; the others take over when it dies, or leave at its end."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from launch.planning.plan import Plan
from launch.run.directory import RunDirectory, request_stop
from launch.slurm import attempts
from tests.helpers.distributed.recorded import assert_the_same_to_the_byte, sha256_of
from tests.slurm.cluster import Cluster, overrides, train_here, until_it_steps, wait

pytestmark = pytest.mark.slurm

LIMIT = 120.0  # seconds, on a machine that does other things too


def _busy(cluster: Cluster, nodes: int) -> str:
    """A job of somebody else that has all but so many nodes."""
    words = [f"--nodes={4 - nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"]
    done = cluster.on("sbatch", "--parsable", *words)
    assert done.returncode == 0, done.stderr
    _until(cluster, done.stdout.strip(), "RUNNING")
    return done.stdout.strip()


def _until(cluster: Cluster, job: str, state: str, limit: float = LIMIT) -> None:
    wait(lambda: cluster.job(job).state == state, limit, lambda: f"{job}: {cluster.job(job)}")


def _ends(run: RunDirectory) -> list[tuple[str, str | None]]:
    return [(one.job, one.how) for one in attempts.read_ledger(run).attempts]


def _wakes(cluster: Cluster, job: str) -> None:
    """What the clock does after 15 minutes."""
    assert cluster.on("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0


def _is_put_off(cluster: Cluster, job: str) -> bool:
    """It waits, and not for nodes: Slurm may not start it for the next ten minutes."""
    told = cluster.on("scontrol", "show", "job", "-o", job).stdout
    match = re.search(r"JobState=PENDING .*EligibleTime=(\S+)", told)
    if match is None or match[1] == "Unknown":
        return False
    return (datetime.fromisoformat(match[1]) - datetime.now()).total_seconds() > 600


def test_the_others_stand_by_take_over_and_leave(cluster: Cluster, trainer: Path) -> None:
    other = _busy(cluster, 1)
    run = cluster.submit("turns", "--nodes", "2,1", python=str(trainer))
    two, one = attempts.read_ledger(run).submitted

    def says() -> str:
        jobs = [cluster.on("scontrol", "show", "job", "-o", job).stdout for job in (one, two)]
        return "\n".join([cluster.words_of(run), *jobs])

    wait(lambda: _ends(run) == [(one, None)], LIMIT, says)
    status = json.loads(
        cluster.samestep("status", run.name, "--runs-dir", str(cluster.runs), "--json").stdout
    )
    assert (status[0]["job"], status[0]["state"]) == (one, "running")
    # There are nodes for the other, which is told not to begin; when it does all the same, it goes back.
    cluster.on("scancel", other)
    wait(lambda: _is_put_off(cluster, two), LIMIT, says)
    _wakes(cluster, two)
    wait(lambda: _ends(run)[-1] == (two, "standby"), LIMIT, says)
    wait(lambda: _is_put_off(cluster, two), LIMIT, says)
    # The one that has it is taken away: the other goes on at once, with its two nodes.
    assert cluster.on("scontrol", "requeue", one).returncode == 0
    wait(lambda: _ends(run)[-1] == (two, None), LIMIT, says)
    assert _ends(run)[0] == (one, "preempted")
    assert Plan.read(run.plan_file).nodes == 2
    # Its first node dies without a word: who stood by takes over once the time is up, and brings it to its end.
    wait(lambda: _is_put_off(cluster, one), LIMIT, says)
    head = cluster.nodes_of(run)[0]
    cluster.control("crash", head)
    cluster.on("scontrol", "update", f"NodeName=n{head}", "State=DOWN", "Reason=test")
    _until(cluster, two, "PENDING")
    cluster.on("scontrol", "hold", two)  # or it might be the first again
    _wakes(cluster, one)
    wait(lambda: _ends(run)[-1] == (one, None), LIMIT, says)
    cluster.control("start")
    assert Plan.read(run.plan_file).nodes == 1
    (run.path / "enough").touch()
    _until(cluster, one, "COMPLETED")
    _until(cluster, two, "CANCELLED")
    ends = [how for _, how in _ends(run) if how != "standby"]
    assert ends == ["preempted", "node_fail", "done"], says()


def test_two_that_start_at_once_do_not_both_train_and_a_stop_is_meant_for_all(
    cluster: Cluster, trainer: Path
) -> None:
    run = cluster.submit("at-once", "--nodes", "2,1", python=str(trainer), options=["--hold"])
    jobs = attempts.read_ledger(run).submitted
    assert cluster.on("scontrol", "release", *jobs).returncode == 0

    def decided() -> bool:
        return len(_ends(run)) >= 2 or "BeginTime" in [cluster.job(job).reason for job in jobs]

    wait(decided, LIMIT, lambda: cluster.words_of(run))
    assert [how for _, how in _ends(run)].count(None) == 1, cluster.words_of(run)
    winner = attempts.read_ledger(run).job
    (loser,) = {*jobs} - {winner}
    _until(cluster, loser, "PENDING")
    request_stop(run, "user")
    _until(cluster, loser, "CANCELLED")
    _until(cluster, str(winner), "FAILED")


def test_a_job_goes_on_with_another_number_of_nodes(cluster: Cluster, trainer: Path) -> None:
    run = cluster.submit("elastic", "--nodes", "2", python=str(trainer))
    (job,) = attempts.read_ledger(run).submitted
    for nodes in (4, 1):  # a process and a CPU a node
        wait(lambda: attempts.read_ledger(run).open is not None, LIMIT, lambda: cluster.words_of(run))
        assert cluster.on("scontrol", "requeue", job).returncode == 0
        size = [f"NumNodes={nodes}-{nodes}", f"NumTasks={nodes}", f"NumCPUs={nodes}"]
        assert cluster.on("scontrol", "update", f"JobId={job}", *size).returncode == 0
        wait(
            lambda nodes=nodes: Plan.read(run.plan_file).nodes == nodes, LIMIT, lambda: cluster.words_of(run)
        )
    wait(lambda: attempts.read_ledger(run).open is not None, LIMIT, lambda: cluster.words_of(run))
    options = ["--parsable", f"--dependency=afterany:{job}", "--nodes=3"]
    again = cluster.on("sbatch", *options, str(run.path / "submit.sbatch")).stdout.strip()
    run.stop_file.write_text("resize\n")
    wait(lambda: _ends(run)[-1] == (job, "stopped"), LIMIT, lambda: cluster.words_of(run))
    run.stop_file.unlink()  # as the trainer does, which has answered it
    wait(lambda: Plan.read(run.plan_file).nodes == 3, LIMIT, lambda: cluster.words_of(run))
    (run.path / "enough").touch()
    _until(cluster, again, "COMPLETED")
    ends = [(job, "preempted"), (job, "preempted"), (job, "stopped"), (again, "done")]
    assert _ends(run) == ends, cluster.words_of(run)


@pytest.mark.long
def test_the_run_of_several_jobs_is_that_of_one_to_the_byte(cluster: Cluster) -> None:
    """Nobody disturbs the first; of a second run the other job takes over, and goes on as one does here by hand."""
    here = train_here("here-first", cluster.runs, 1, 40)
    other = _busy(cluster, 1)
    run = cluster.submit("first", "--nodes", "2,1", steps=40)
    two, one = attempts.read_ledger(run).submitted
    _until(cluster, one, "COMPLETED", 400)
    _until(cluster, two, "CANCELLED")
    assert _ends(run) == [(one, "done")], cluster.words_of(run)
    assert_the_same_to_the_byte(run.path, here.path)

    run = cluster.submit("second", "--nodes", "2,1", "--set", "checkpoint.keep=20", steps=40)
    two, one = attempts.read_ledger(run).submitted
    until_it_steps(cluster, run, 0, 6)
    cluster.on("scancel", other)
    assert cluster.on("scontrol", "requeue", one).returncode == 0
    _until(cluster, two, "COMPLETED", 400)
    _until(cluster, one, "CANCELLED")
    first, second = attempts.read_ledger(run).attempts
    assert ((first.job, first.how), (second.job, second.how)) == ((one, "preempted"), (two, "done"))
    assert 0 < second.first_step < 40
    words = ["run", "embedded", *overrides(40), "--set", "checkpoint.keep=20", "--name", "by-hand"]
    source = run.path / f"checkpoint-{second.first_step}"
    done = cluster.samestep(
        *words, "--runs-dir", str(cluster.runs), "--gpus-per-node", "2", "--from", str(source)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    by_hand = RunDirectory(cluster.runs / "by-hand")
    assert sha256_of(run.path) == sha256_of(by_hand.path)
