"""A run on 1, 2 and 4 nodes of a real Slurm cluster is the run of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.run.directory import RunDirectory, read_marker
from launch.slurm import attempts
from tests.helpers.distributed.recorded import apart, sha256_of
from tests.slurm.cluster import Cluster, last_step, template_by_hand, train_here, wait

pytestmark = pytest.mark.slurm

STEPS = 8


@pytest.fixture(scope="module")
def here(cluster: Cluster) -> RunDirectory:
    """Two processes on this machine, without Slurm."""
    return train_here("here", cluster.runs, 2, STEPS)


def test_one_two_and_four_nodes_are_the_run_of_this_machine(
    cluster: Cluster, here: RunDirectory, tmp_path: Path
) -> None:
    submitted = {
        nodes: cluster.submit(f"nodes-{nodes}", "--nodes", str(nodes), steps=STEPS) for nodes in (1, 2, 4)
    }
    script = template_by_hand(tmp_path, cluster.runs, "hand", STEPS)
    by_hand = cluster.on("sbatch", "--parsable", "--nodes=2", str(script), "recipes/embedded.yaml")
    assert by_hand.returncode == 0, by_hand.stderr
    for run in submitted.values():
        assert cluster.until_gone(run) == "COMPLETED", cluster.words_of(run)
    hand = RunDirectory(cluster.runs / "hand")
    wait(lambda: attempts.read_ledger(hand).job is not None, 200, lambda: cluster.on("squeue").stdout)
    assert cluster.until_gone(hand) == "COMPLETED", cluster.words_of(hand)
    assert attempts.read_ledger(hand).job == by_hand.stdout.strip()
    for nodes, run in {**submitted, 0: hand}.items():
        losses, weights = apart(run.path, here.path)
        assert losses < 1e-6, nodes
        assert weights < 1e-5, nodes
    # The same number of processes, wherever they are: by hand there are two on each of two nodes.
    assert sha256_of(submitted[2].path) == sha256_of(here.path)
    assert sha256_of(submitted[4].path) == sha256_of(hand.path)
    _look_at(cluster, submitted[2])


def _look_at(cluster: Cluster, run: RunDirectory) -> None:
    """status and logs of a run that is done; a second job of it exits at once."""
    told = cluster.samestep("status", run.name, "--runs-dir", str(cluster.runs), "--json")
    (found,) = json.loads(told.stdout)
    assert (found["state"], found["step"], found["checkpoint_step"], found["requeued"]) == (
        "done",
        STEPS,
        STEPS,
        0,
    )
    logs = cluster.samestep("logs", run.name, "--runs-dir", str(cluster.runs)).stdout
    assert f"step {STEPS}/{STEPS}" in logs
    assert cluster.samestep("logs", run.name, "--rank", "1", "--runs-dir", str(cluster.runs)).returncode == 0
    again = cluster.on("sbatch", "--parsable", str(run.path / "submit.sbatch")).stdout.strip()
    wait(lambda: cluster.job(again).state == "COMPLETED", 200, lambda: cluster.words_of(run))
    marker = read_marker(run)
    assert marker is not None
    assert marker.kind == "DONE"
    assert len(attempts.read_ledger(run).attempts) == 1
    assert last_step(run) == STEPS


def test_what_follows_runs_after_a_good_end_and_no_module_of_the_work_folder_is_imported(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.slurm.cluster.ROOT", tmp_path)  # what the jobs' commands begin in
    for name in ("launch.py", "trainer.py", "datasets.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    run = cluster.submit("then", "--then", "merge", steps=2)
    assert cluster.until_gone(run) == "COMPLETED", cluster.words_of(run)
    merge = str(int(attempts.read_ledger(run).job or 0) + 1)
    wait(lambda: cluster.job(merge).state == "COMPLETED", 400, lambda: cluster.words_of(run), pause=1)
    assert (run.merged / "config.json").is_file()
