"""What a job decides on its first node."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import pytest

from launch.planning.plan import Plan
from launch.run.directory import RunDirectory, read_marker, request_stop, write_marker
from launch.run.lock import hold_lock
from launch.slurm import attempts as ledger
from launch.slurm import job as allocation
from tests.helpers.fake_slurm import install
from tests.helpers.launcher import EMBEDDED, samestep, stand_in, write_adapter

KIND = "4,4096,gpu:4,(null)"
RUNNING = "JobId=41 JobState=RUNNING Reason=None Requeue=1 Restarts={}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunDirectory:
    """A submitted run of two nodes, inside its job."""
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    install(monkeypatch, tmp_path / "slurm")
    assert samestep("submit", *EMBEDDED, "--nodes", "2", "--gpus-per-node", "4", "--device", "cpu") == 0
    _attempt(monkeypatch, 0)
    return RunDirectory(Path("runs/embedded").absolute())


def _attempt(monkeypatch: pytest.MonkeyPatch, restart: int, nodes: int = 2) -> None:
    values = {
        "JOB_ID": "41",
        "RESTART_COUNT": str(restart),
        "JOB_NUM_NODES": str(nodes),
        "JOB_NODELIST": "n[1-2]",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def _main(command: str, target: RunDirectory | str, *words: str) -> int:
    """As the script of the job and attempt that the variables name."""
    which = f"{os.environ.get('SLURM_JOB_ID', '41')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    place = target if isinstance(target, str) else str(target.path)
    return allocation.main([command, place, "--attempt", which, *words])


def _begin(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], queue: str = "41 RUNNING 1", *words: str
) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = _main("begin", run, "--device", "cpu", "--queue", queue, *words)
    return status, capsys.readouterr().out.splitlines()


def _end(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], job: str = RUNNING.format(0), *words: str
) -> tuple[int, str]:
    capsys.readouterr()
    status = _main("end", run, "--job", job, *words)
    return status, capsys.readouterr().out


def test_a_submitted_run_begins_as_planned(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    request_stop(run, "preempted")  # of an attempt that could not answer it
    write_marker(run, "STOPPED", "preempted: at step 0 of 6")
    before = run.plan_file.read_text()
    status, (folder, config, processes) = _begin(run, capsys)
    assert (status, folder, Path(config).name, processes) == (0, str(run.path), "ddp.yaml", "4")
    assert run.plan_file.read_text() == before
    assert read_marker(run) is None
    assert not run.stop_file.exists()
    attempt = ledger.read_ledger(run).open
    assert attempt is not None
    assert (attempt.job, attempt.nodes, attempt.first_step) == ("41", "n[1-2]", 0)


def test_the_first_nodes_packages_and_gpus_are_judged_before_its_processes_start(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.rules.machine_rules._installed", lambda: {"accelerate": "1.14.2"})
    assert _main("begin", run) == 2
    told = capsys.readouterr()
    assert "error: versions: too old (accelerate 1.14.2 < 1.15)" in told.err
    assert told.out == ""
    monkeypatch.undo()

    monkeypatch.chdir(run.path.parent.parent)
    _attempt(monkeypatch, 0)
    monkeypatch.setattr("launch.slurm.job.compute_capability", lambda: (7, 5))
    values = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps({**values, "device": "cuda"}))
    recipe = run.recipe_file.read_text()
    run.recipe_file.write_text(recipe.replace("dtype: float32", "dtype: bfloat16"))
    assert _main("begin", run) == 2
    assert "compute capability 7.5" in capsys.readouterr().err


def test_another_number_of_nodes_is_planned_anew(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _attempt(monkeypatch, 0, nodes=3)
    assert _begin(run, capsys)[0] == 0
    plan = Plan.from_json(run.plan_file.read_text())
    assert (plan.nodes, plan.gpus_per_node, plan.world_size) == (3, 4, 12)


def test_a_recipe_is_planned_for_the_allocation(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    words = ["embedded", "--set", "training.max_steps=6", "--name", "hand"]
    assert _main("begin", *words, "--device", "cuda") == 0
    plan = Plan.from_json((run.path.parent / "hand" / "plan.json").read_text())
    assert (plan.nodes, plan.gpus_per_node, plan.device, plan.strategy) == (2, 2, "cuda", "ddp")
    capsys.readouterr()
    assert _main("begin", *words, "--device", "cpu", "--strategy", "single") == 2
    assert "--strategy: single is one process" in capsys.readouterr().err
    assert _main("begin", *words, "--device", "cpu", "--strategy", "") == 2
    assert "--strategy: '' is none of single, ddp" in capsys.readouterr().err


def test_a_finished_run_exits_at_once(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(run.adapter)
    write_marker(run, "DONE", "step 6")
    assert _begin(run, capsys) == (0, [])
    assert ledger.read_ledger(run).attempts == ()


def test_a_stop_of_the_user_holds_for_an_attempt_that_has_not_begun(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    request_stop(run, "user")
    assert _begin(run, capsys) == (1, [])
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, marker.text) == ("STOPPED", "user: at step 0 of 6")
    assert [attempt.how for attempt in ledger.read_ledger(run).attempts] == ["stopped"]
    assert _begin(run, capsys)[0] == 0  # answered: the next one begins


@pytest.mark.parametrize(
    ("marker", "text", "job", "status", "said"),
    [
        ("DONE", "step 6", RUNNING, 0, ""),
        ("REFUSED", "lora.r: bad (1); mend it", RUNNING, 2, ""),
        ("STOPPED", "user: at step 3 of 6", RUNNING, 1, ""),
        ("STOPPED", "preempted: at step 3 of 6", RUNNING, 0, "requeue\n"),
        ("STOPPED", "time: at step 3 of 6", RUNNING, 0, "requeue\n"),
        ("STOPPED", "preempted: at step 3 of 6", "JobId=41 JobState=COMPLETING Restarts=1", 0, ""),
        ("STOPPED", "preempted: at step 3 of 6", "JobId=41 JobState=COMPLETING Restarts=0", 1, ""),
        ("STOPPED", "preempted: at step 3 of 6", "JobId=41 JobState=RUNNING Requeue=0", 1, ""),
        (None, "", RUNNING, 0, "requeue\n"),
        (None, "", "", 0, "requeue\n"),
    ],
)
def test_the_end_decides_what_comes_next(
    marker: str | None,
    text: str,
    job: str,
    status: int,
    said: str,
    run: RunDirectory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _begin(run, capsys)
    if marker:
        write_marker(run, marker, text)  # type: ignore[arg-type]
    assert _end(run, capsys, job.format(0)) == (status, said)
    assert ledger.read_ledger(run).open is None


def test_a_run_that_gets_nowhere_stops_with_the_reason(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for restart in range(2):
        _attempt(monkeypatch, restart)
        _begin(run, capsys)
        assert _end(run, capsys, RUNNING.format(restart)) == (0, "requeue\n")
    _attempt(monkeypatch, 2)
    _begin(run, capsys)
    assert _main("end", run, "--job", RUNNING.format(2)) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "job 41 is not queued again: no step was saved in 3 attempts in a row" in told.err


def test_attempts_whose_node_died_are_closed_by_the_next_and_count(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = ["--nodes", f"{KIND}|down*|n[2-5]\n{KIND}|mixed|n1"]
    for restart in range(6):
        _attempt(monkeypatch, restart)
        assert _begin(run, capsys, "41 RUNNING 1", *nodes)[0] == 0
    _attempt(monkeypatch, 6)
    assert _main("begin", run) == 1
    assert "no step was saved in 6 attempts in a row (node_fail, node_fail," in capsys.readouterr().err
    attempts = ledger.read_ledger(run).attempts
    assert "left no word" in attempts[2].reason
    assert (attempts[2].how, attempts[2].failed_nodes) == ("node_fail", "n2")
    assert (attempts[6].how, attempts[6].restart) == ("refused", 6)
    assert "job 41: no step was saved in 6 attempts in a row" in attempts[6].reason


def test_a_marker_that_cannot_be_read_is_no_reason_to_refuse_the_next_attempt(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    (run.path / "STOPPED").write_bytes(b"\xff\xfe")
    _attempt(monkeypatch, 1)
    assert _begin(run, capsys)[0] == 0
    assert [one.how for one in ledger.read_ledger(run).attempts] == ["crashed", None]


def test_a_job_may_crash_as_often_as_it_was_submitted_for(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--max-crashes", "1"]
    _begin(run, capsys, "41 RUNNING 1", *words)
    assert _end(run, capsys, RUNNING.format(0), *words) == (1, "")
    (attempt,) = ledger.read_ledger(run).attempts
    assert (attempt.how, attempt.max_crashes) == ("crashed", 1)


def test_a_ledger_that_cannot_be_written_does_not_keep_the_job_from_the_queue(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    _fill_the_disk(monkeypatch)
    assert _end(run, capsys) == (0, "requeue\n")


# two jobs of one run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "status", "printed", "how"),
    [
        ("RUNNING", 1, [], "refused"),
        ("SUSPENDED", 1, [], "refused"),
        ("COMPLETING", 0, ["requeue"], "crashed"),
    ],
)
def test_a_second_job_does_not_begin_before_the_trainer_of_the_first_has_the_lock(
    state: str,
    status: int,
    printed: list[str],
    how: str,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _begin(run, capsys)[0] == 0
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(run, capsys, f"41 {state} 1\n42 RUNNING 1") == (status, printed)
    book = ledger.read_ledger(run)
    assert [(attempt.job, attempt.how) for attempt in book.attempts] == [("41", None), ("42", how)]
    assert f"job 41 of this run is {'under way' if status else 'completing'}" in book.attempts[1].reason
    assert book.job == "41"
    assert read_marker(run) is None
    assert ledger.attempt_file(run).read_text() == "41.0\n"


@pytest.mark.parametrize("queue", ["42 RUNNING 1", "41 PENDING 1\n42 RUNNING 1", ""])
def test_a_job_that_is_gone_or_waits_is_not_in_the_way(
    queue: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _begin(run, capsys)[0] == 0
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(run, capsys, queue)[0] == 0
    ends = [(attempt.job, attempt.how) for attempt in ledger.read_ledger(run).attempts]
    assert ends == [("41", "crashed"), ("42", None)]


def test_of_two_jobs_that_begin_at_once_the_later_one_gives_way(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_job = allocation.plan_job

    def meanwhile(options: argparse.Namespace, given: allocation.Allocation) -> allocation.JobPlan:
        facts = {"job": "40", "restart": 0, "began": time.time(), "first_step": 0}
        ledger.write_event(run, "start", **facts)
        return plan_job(options, given)

    monkeypatch.setattr(allocation, "plan_job", meanwhile)
    assert _begin(run, capsys, "40 PENDING 1\n41 RUNNING 1") == (0, ["requeue"])
    assert ledger.read_ledger(run).job == "40"


# what is in the way for a while -----------------------------------------------------------------


def _fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "ledger.jsonl")

    monkeypatch.setattr("launch.slurm.attempts.write_event", full)


def test_a_full_disk_is_tried_again_and_not_for_ever(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill_the_disk(monkeypatch)
    for restart in range(2):
        _attempt(monkeypatch, restart)
        assert _begin(run, capsys) == (0, ["requeue"])
    _attempt(monkeypatch, 2)
    assert _main("begin", run) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "ledger.jsonl: No space left on device; job 41 is not queued again: no step was saved" in told.err


def test_a_disk_without_room_for_a_new_plan_is_tried_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _attempt(monkeypatch, 0, nodes=3)
    monkeypatch.setattr("launch.local.planned_run.NEEDED_BYTES", 2**60)
    assert _begin(run, capsys) == (0, ["requeue"])
    (attempt,) = ledger.read_ledger(run).attempts
    assert "no space left for a run" in attempt.reason


def test_a_lock_that_is_held_on_is_tried_again_and_counts(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(allocation, "PATIENCE_S", 0.0)
    with hold_lock(run.path):
        assert _begin(run, capsys) == (0, ["requeue"])
        (attempt,) = ledger.read_ledger(run).attempts
        assert (attempt.how, attempt.saved) == ("crashed", False)
        assert "this run is under way (process" in attempt.reason
        _attempt(monkeypatch, 1)
        assert _begin(run, capsys, "41 RUNNING 0") == (1, [])  # --no-requeue
        _attempt(monkeypatch, 2)
        assert _begin(run, capsys) == (1, [])
    assert len(ledger.read_ledger(run).attempts) == 3
    assert ledger.reason_to_give_up(ledger.read_ledger(run).attempts, 3) is not None


def test_a_job_taken_away_for_a_dead_node_has_crashed(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    request_stop(run, "preempted")
    words = [
        "--asked",
        "preempted",
        "--nodes",
        f"{KIND}|mixed|n1\n{KIND}|down*|n[2-3]",
        "--job",
        RUNNING.format(1),
    ]
    assert _main("end", run, *words) == 0
    last = ledger.read_ledger(run).attempts[-1]
    assert (last.how, last.reason, last.failed_nodes) == ("node_fail", "node failure: n2", "n2")


@pytest.mark.parametrize(
    ("nodes", "job", "said"),
    [
        # n2 died. Two others of its kind are left:
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|idle~|n3", "", "requeue exclude=n2\n"),
        # only one,
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2", "", "requeue\n"),
        # or a second one of another kind, or that is to be mended, or that the job may not have:
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2\n8,1,gpu:1,b|idle|n3", "", "requeue\n"),
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|drained|n3", "", "requeue\n"),
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|idle|n3", " ExcNodeList=n3", "requeue\n"),
        (
            f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|idle|n[3-4]",
            " ExcNodeList=n3",
            "requeue exclude=n2,n3\n",
        ),
        # or nodes that it asked for by name.
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|idle|n3", " ReqNodeList=n[1-2]", "requeue\n"),
        # Slurm has queued it already.
        (f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|idle|n3", " Restarts=1", "exclude=n2\n"),
    ],
)
def test_a_node_that_failed_is_left_out_where_others_fit(
    nodes: str, job: str, said: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    assert _end(run, capsys, RUNNING.format(0) + job, "--nodes", nodes) == (0, said)


def test_the_newest_failures_are_left_out_and_the_old_ones_forgotten(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"first_step": 0, "how": "node_fail", "job": "41"}
    for restart, (ended, node) in enumerate([(1.0, "n7"), (time.time(), "n3"), (time.time(), "n4")]):
        facts = {
            **first,
            "restart": restart,
            "began": ended,
            "ended": ended,
            "failed_nodes": node,
            "last_step": 1,
        }
        ledger.write_event(run, "unstarted", **facts)
    _attempt(monkeypatch, 3)
    _begin(run, capsys)
    # Room for two: of n2, which died now, n4 and n3 the oldest comes back; n7 failed days ago, n9 is the user's wish.
    nodes = f"{KIND}|mixed|n1\n{KIND}|down*|n2\n{KIND}|idle|n[3-4,9]"
    job = RUNNING.format(3) + " ExcNodeList=n[3-4,7,9]"
    assert _end(run, capsys, job, "--nodes", nodes) == (0, "requeue exclude=n2,n4,n9\n")


def test_a_job_of_parts_is_refused(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert _begin(run, capsys, "41 RUNNING 1", "--job", f"{RUNNING.format(0)} HetJobId=41") == (2, [])
    (attempt,) = ledger.read_ledger(run).attempts
    assert "job 41: is heterogeneous, and a run needs nodes of one kind" in attempt.reason


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_task_of_an_array_does_not_take_the_run_of_another(
    meanwhile: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.time() + (60 if meanwhile else -1)  # while this one was asking what others do, or before
    ledger.write_event(run, "start", job="41_0", restart=0, began=began, first_step=0)
    monkeypatch.setenv("SLURM_JOB_ID", "41_1")
    queue = "41_1 RUNNING 1\n41_0 PENDING 1" if meanwhile else "41_1 RUNNING 1\n41_0 RUNNING 1"
    assert _begin(run, capsys, queue) == (1, [])
    refused = ledger.read_ledger(run).attempts[-1]
    assert (refused.job, refused.how) == ("41_1", "refused")
    assert "job 41_0 of this run is under way" in refused.reason
    assert "OPTIONS=(--name mine-$SLURM_ARRAY_TASK_ID)" in refused.reason
    # One after another (--array=0-1%1) they take turns.
    assert _begin(run, capsys, "41_1 RUNNING 1")[0] == (1 if meanwhile else 0)


def test_outside_a_job_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert _main("begin", "embedded") == 2
    assert "SLURM_JOB_ID: is not set" in capsys.readouterr().err


def test_another_number_of_gpus_than_planned_is_refused_before_anything_starts(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps({**plan, "device": "cuda"}))
    _attempt(monkeypatch, 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(plan["gpus_per_node"] + 1))
    assert _main("begin", run, "--device", "cuda") == 2
    assert "--gpus-per-node: the plan of" in capsys.readouterr().err
    (refused,) = ledger.read_ledger(run).attempts
    assert refused.how == "refused"
    assert "--gpus-per-node: the plan of" in refused.reason
    marker = read_marker(run)
    assert marker is not None
    assert marker.kind == "REFUSED"
