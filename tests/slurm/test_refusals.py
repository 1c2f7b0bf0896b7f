"""What a real Slurm refuses, and runs that must not be queued again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch.run.directory import RunDirectory, request_stop
from launch.slurm import attempts
from tests.slurm.cluster import Cluster, until_it_steps, wait

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (
            ["--partition", "closed", "--account", "stranger"],
            "Invalid account or account/partition combination",
        ),
        (["--nodes", "5"], "(cpus_per_process: 1 x 1 processes are 1 CPUs of a node)"),
        (
            ["--gpus-per-node", "5"],
            "cpus_per_process: 1 x 5 processes are 5 CPUs of a node, and no node of this clus",
        ),
        (["--time", "soon"], "give a time limit as of sbatch"),
        (["--partition", 'a "b" $HOME `id`'], 'invalid partition specified: a "b" $HOME `id`'),
    ],
)
def test_the_cause_is_one_message_and_status_two(words: list[str], cause: str, cluster: Cluster) -> None:
    done = cluster.try_to_submit("refused", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert cause in done.stderr or ("--nodes" in words and "sbatch: refused" in done.stderr), done.stderr
    assert not (cluster.runs / "refused").exists()


def test_a_folder_of_odd_characters_gets_its_log(cluster: Cluster) -> None:
    place = cluster.runs / 'o d\'d "x" $HOME `id`;#%j'
    done = cluster.try_to_submit("odd", "--runs-dir", str(place), python="/bin/false")
    assert done.returncode == 0, done.stderr
    logs = place / "odd" / "logs"
    wait(lambda: any(logs.glob("*.out")), 200, lambda: cluster.on("squeue").stdout)


def test_a_run_that_is_refused_on_the_nodes_is_not_queued_again(cluster: Cluster) -> None:
    run = cluster.submit("other-data", "--nodes", "2", options=["--hold"])
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps({**plan, "dataset_fingerprint": "0" * 64}))
    cluster.on("scontrol", "release", attempts.read_ledger(run).job or "")
    assert cluster.until_gone(run) == "FAILED", cluster.words_of(run)
    assert attempts.read_ledger(run).attempts[-1].how == "refused"
    assert "was made for other data" in attempts.read_ledger(run).attempts[-1].reason


def test_a_run_that_gets_nowhere_stops_after_three_attempts(cluster: Cluster, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[ "$2" != accelerate.commands.launch ] || exit 7\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run = cluster.submit("nowhere", "--nodes", "2", python=str(python))
    assert cluster.until_gone(run) == "FAILED", cluster.words_of(run)
    book = attempts.read_ledger(run)
    assert [attempt.how for attempt in book.attempts] == ["crashed"] * 3
    reason = attempts.reason_to_give_up(book.attempts, attempts.MAX_CRASHES)
    assert "no step was saved in 3 attempts in a row" in (reason or "")
    told = cluster.samestep("status", run.name, "--runs-dir", str(cluster.runs), "--json").stdout
    (found,) = json.loads(told)
    assert (found["state"], found["crashed"]) == ("failed", 3)
    assert "no step was saved" in found["because"]


def test_a_run_that_the_user_stops_is_not_queued_again_and_what_follows_does_not_start(
    cluster: Cluster,
) -> None:
    run = cluster.submit("stopped", "--nodes", "2", "--then", "evaluate", steps=400)
    first = attempts.read_ledger(run).job or ""
    wait(lambda: attempts.read_ledger(run).open is not None, 200, lambda: cluster.words_of(run))
    # A second job, when the first has begun and its trainer has not taken the lock: turned away.
    second = _submit_again(cluster, run)
    _until(cluster, run, second, "FAILED")
    until_it_steps(cluster, run, 0, 2)
    request_stop(run, "user")
    assert cluster.until_gone(run) == "FAILED", cluster.words_of(run)
    ends = [(attempt.job, attempt.how) for attempt in attempts.read_ledger(run).attempts]
    assert ends == [(first, "stopped"), (second, "refused")], cluster.words_of(run)
    assert f"job {first} of this run is under way" in attempts.read_ledger(run).attempts[1].reason
    _until(cluster, run, str(int(first) + 1), "CANCELLED")  # the evaluation
    # The same script goes on; and a job that is cancelled stays cancelled.
    again = _submit_again(cluster, run)
    until_it_steps(cluster, run, 0, 2)
    cluster.on("scancel", again)
    _until(cluster, run, again, "CANCELLED")
    last = attempts.read_ledger(run).attempts[-1]
    assert (last.how, last.job) == ("stopped", again)
    assert last.last_step > last.first_step > 0


def _submit_again(cluster: Cluster, run: RunDirectory) -> str:
    return cluster.on("sbatch", "--parsable", str(run.path / "submit.sbatch")).stdout.strip()


def _until(cluster: Cluster, run: RunDirectory, job: str, state: str) -> None:
    wait(lambda: cluster.job(job).state == state, 200, lambda: cluster.words_of(run))
