"""What a job decides on its first node."""

from __future__ import annotations

import argparse
import json
import os
import threading
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


@pytest.mark.parametrize(
    ("named", "nodes", "strategy"), [("ddp", 3, "ddp"), ("ddp", 1, "single"), ("single", 2, "ddp")]
)
def test_a_named_strategy_stays_on_other_nodes_unless_one_process_has_its_own(
    named: str,
    nodes: int,
    strategy: str,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = 1 if named == "single" else 2
    words = [
        "--nodes",
        str(before),
        "--gpus-per-node",
        "1",
        "--device",
        "cpu",
        "--strategy",
        named,
        "--name",
        named,
    ]
    assert samestep("submit", *EMBEDDED, *words) == 0
    other = RunDirectory(run.path.parent / named)
    _attempt(monkeypatch, 0, nodes=nodes)
    assert _begin(other, capsys)[0] == 0
    plan = Plan.from_json(other.plan_file.read_text())
    assert (plan.nodes, plan.strategy, bool(plan.strategy_reason)) == (nodes, strategy, strategy != named)


def test_a_strategy_chosen_without_the_memory_of_the_gpus_is_chosen_again_where_it_is_known(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(run.plan_file.read_text())
    assert values["strategy_reason"].startswith("no GPU here")
    run.plan_file.write_text(json.dumps({**values, "device": "cuda", "gpu_memory": 0}))
    monkeypatch.setattr("launch.slurm.job_plan.gpu_memory", lambda: 80 * 2**30)
    monkeypatch.setattr("launch.slurm.job.compute_capability", lambda: (9, 0))
    _begin(run, capsys)
    plan = Plan.from_json(run.plan_file.read_text())
    assert (plan.strategy, plan.gpu_memory) == ("ddp", 80 * 2**30)
    assert "the memory of the GPUs" not in plan.strategy_reason
    named = {
        **json.loads(run.plan_file.read_text()),
        "strategy": "zero2",
        "strategy_reason": "",
        "gpu_memory": 0,
    }
    run.plan_file.write_text(json.dumps(named))
    _begin(run, capsys)
    assert json.loads(run.plan_file.read_text()) == named


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
    asked = "40 PENDING 1\n41 RUNNING 1"
    assert _begin(run, capsys, asked, "--seen", "") == (0, ["ask 40.0 40,41"])
    monkeypatch.setattr(allocation, "plan_job", plan_job)
    assert _begin(run, capsys, "40 RUNNING 1\n41 RUNNING 1", "--seen", "40.0") == (1, [])
    assert [(one.job, one.how) for one in ledger.read_ledger(run).attempts] == [
        ("40", None),
        ("41", "refused"),
    ]


def test_a_job_waits_for_another_that_still_decides(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.run.lock._LOCK_PATIENCE_S", 0.0)
    plan_job, holds = allocation.plan_job, threading.Event()

    def other() -> None:
        with hold_lock(run.path):
            holds.set()
            time.sleep(0.3)
            ledger.write_event(run, "start", job="40", restart=0, began=time.time(), first_step=0)

    beside = threading.Thread(target=other)

    def meanwhile(options: argparse.Namespace, given: allocation.Allocation) -> allocation.JobPlan:
        beside.start()
        assert holds.wait(10)
        return plan_job(options, given)

    monkeypatch.setattr(allocation, "plan_job", meanwhile)
    assert _begin(run, capsys, "40 RUNNING 1\n41 RUNNING 1", "--seen", "") == (1, [])
    beside.join()
    ends = [(one.job, one.how) for one in ledger.read_ledger(run).attempts]
    assert ends == [("40", None), ("41", "refused")]


@pytest.mark.parametrize("ahead", [-300, 0, 300])
def test_neither_a_late_image_nor_another_nodes_clock_lets_two_jobs_have_one_run(
    ahead: int, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """42 asks squeue while 41 waits; 41 begins, by a clock of its own; then 42 has its image, and decides."""
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: 1e9 + ahead)
        assert _begin(run, capsys)[0] == 0
    monkeypatch.setattr(time, "time", lambda: 1e9 + 60)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    early, whole = "41 PENDING 1\n42 RUNNING 1", ["--seen", "41.0"]
    assert _begin(run, capsys, early, "--seen", "") == (0, ["ask 41.0 41,42"])
    assert len(ledger.read_ledger(run).attempts) == 1  # nothing is written of a question
    assert _begin(run, capsys, "41 RUNNING 1\n42 RUNNING 1", *whole, "--stand-by", "900") == (0, ["standby"])
    # Who does not even see itself was given no answer by squeue.
    assert _begin(run, capsys, "", *whole) == (0, ["requeue"])
    assert "squeue does not even name job 42" in ledger.read_ledger(run).attempts[-1].reason
    # It goes on once it is known that the very attempt is over; of a newer one that is to be asked anew.
    assert _begin(run, capsys, early, "--seen", "41.1") == (0, ["ask 41.0 41,42"])
    assert _begin(run, capsys, early, *whole)[0] == 0
    assert ledger.read_ledger(run).job == "42"


def test_a_script_of_an_older_version_is_told_by_the_clocks(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.write_event(run, "start", job="40", restart=0, began=time.time() + 60, first_step=0)
    assert _begin(run, capsys, "40 PENDING 1\n41 RUNNING 1") == (0, ["requeue"])


def test_an_attempt_that_was_given_up_decides_nothing(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its node was out of reach, and is back when another job has the run."""
    _begin(several, capsys, BOTH, "--stand-by", "900")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(several, capsys, "41 PENDING 1\n42 RUNNING 1", "--seen", "41.0")[0] == 0
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    for words in ([], ["--max-crashes", "1"], ["--unfit", "* n1: data: not prepared"]):
        assert _end(several, capsys, RUNNING.format(0), *words) == (1, "")
    assert read_marker(several) is None
    assert [(one.job, one.how) for one in ledger.read_ledger(several).attempts] == [
        ("41", "crashed"),
        ("42", None),
    ]


# a stop of the user -------------------------------------------------------------------------------


def test_a_stop_asked_for_while_the_run_is_taken_is_not_lost(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large checkpoint is copied just then, say."""
    write = allocation.write_request

    def slowly(*given: object) -> None:
        write(*given)  # type: ignore[arg-type]
        run.stop_file.write_text("user\n")

    monkeypatch.setattr(allocation, "write_request", slowly)
    _attempt(monkeypatch, 0, nodes=3)
    assert _begin(run, capsys) == (1, [])
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, marker.text) == ("STOPPED", "user: at step 0 of 6")
    assert [one.how for one in ledger.read_ledger(run).attempts] == ["stopped"]
    assert not run.stop_file.exists()


@pytest.mark.parametrize("said", [True, False])
def test_a_stop_is_not_forgotten_when_slurm_queues_the_job_again(
    said: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preemption takes the job away while it stops, with or without time for its last words."""
    _begin(run, capsys)
    write_marker(run, "STOPPED", "user: at step 3 of 6")
    if said:
        assert _end(run, capsys, "JobId=41 JobState=COMPLETING Restarts=1") == (1, "")
    _attempt(monkeypatch, 1)
    assert _begin(run, capsys) == (1, [])
    first, second = ledger.read_ledger(run).attempts
    assert (first.how, second.how) == ("stopped", "refused")
    assert "was stopped, and queued again by Slurm alone" in second.reason
    marker = read_marker(run)
    assert marker is not None
    assert marker.text == "user: at step 3 of 6"
    monkeypatch.setenv("SLURM_JOB_ID", "43")  # submitted by hand since
    _attempt(monkeypatch, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert _begin(run, capsys, "43 RUNNING 1")[0] == 0


def test_a_stop_whose_job_died_before_its_last_words_is_meant_for_all(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900")
    write_marker(several, "STOPPED", "user: at step 3 of 6")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(several, capsys, "42 RUNNING 1", "--seen", "41.0", "--stand-by", "900") == (1, [])
    assert "job 41 of the same submission was stopped" in ledger.read_ledger(several).attempts[-1].reason


def test_clocks_that_differ_hide_no_stop(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """41 had a node five minutes ahead, and was taken away; 42 was stopped after it."""
    ledger.write_event(several, "submit", job="43", alternatives="41,42,43")
    attempt = {"restart": 0, "first_step": 0, "began": 1300.0}
    ledger.write_event(several, "start", job="41", **attempt)
    ledger.write_event(several, "end", job="41", how="preempted", ended=1400.0)
    ledger.write_event(several, "start", job="42", **{**attempt, "began": 1110.0})
    ledger.write_event(several, "end", job="42", how="stopped", reason="user: at step 3 of 6", ended=1120.0)
    book = ledger.read_ledger(several)
    assert (book.job, book.last and book.last.how) == ("42", "stopped")
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert _begin(several, capsys, "43 RUNNING 1", "--stand-by", "900") == (1, [])
    assert "job 42 of the same submission was stopped" in ledger.read_ledger(several).attempts[-1].reason


# several jobs of one submission -------------------------------------------------------------------


@pytest.fixture
def several(run: RunDirectory) -> RunDirectory:
    """The run was submitted as jobs 41 and 42; the variables are those of 41."""
    ledger.write_event(run, "submit", job="41", alternatives="41")
    ledger.write_event(run, "submit", job="42", alternatives="41,42")
    return run


BOTH = "41 RUNNING 1\n42 PENDING 1"


def test_whoever_starts_first_takes_the_run_and_the_others_stand_by(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ledger.read_ledger(several).job == "41"
    status, printed = _begin(several, capsys, BOTH, "--stand-by", "900")
    assert (status, len(printed), printed[3]) == (0, 4, "42")
    assert ledger.read_ledger(several).job == "41"
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    for restart, state in enumerate(("RUNNING", "COMPLETING", "RUNNING", "RUNNING")):
        _attempt(monkeypatch, restart, nodes=1)
        monkeypatch.setenv("SLURM_JOB_ID", "42")
        queue = f"41 {state} 1\n42 RUNNING 1"
        assert _begin(several, capsys, queue, "--stand-by", "900") == (0, ["standby"])
    book = ledger.read_ledger(several)
    assert [one.how for one in book.attempts] == [None, *["standby"] * 4]
    assert (book.job, book.last and book.last.job, sum(book.restarts().values())) == ("41", "41", 0)
    # It has done nothing, and nothing of it counts: when 41 is in the queue again, it takes over.
    _attempt(monkeypatch, 4, nodes=1)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    status, printed = _begin(several, capsys, "41 PENDING 1\n42 RUNNING 1", "--stand-by", "900")
    assert (status, printed[3]) == (0, "41")
    assert ledger.read_ledger(several).job == "42"
    plan = Plan.from_json(several.plan_file.read_text())
    assert (plan.nodes, plan.gpus_per_node) == (1, 4)
    # And 41, which is started again, finds the run taken in turn.
    _attempt(monkeypatch, 1)
    assert _begin(several, capsys, "41 RUNNING 1\n42 RUNNING 1", "--stand-by", "900") == (0, ["standby"])


def test_a_job_that_may_not_be_queued_again_cannot_stand_by(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(several, capsys, "41 RUNNING 1\n42 RUNNING 0", "--stand-by", "900") == (1, [])


@pytest.mark.parametrize(
    ("marker", "text", "words"),
    [
        ("DONE", "step 6", "cancel=42\n"),
        ("STOPPED", "user: at step 3 of 6", "cancel=42\n"),
        ("REFUSED", "x: y", "cancel=42\n"),
        ("STOPPED", "preempted: at step 3 of 6", "requeue wake=42\n"),
        (None, "", "requeue wake=42\n"),
    ],
)
def test_the_others_are_woken_when_the_run_is_free_and_leave_when_it_is_over(
    marker: str | None, text: str, words: str, several: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900")
    if marker:
        write_marker(several, marker, text)  # type: ignore[arg-type]
    assert _end(several, capsys)[1] == words


def test_the_others_leave_a_run_that_is_given_up(
    several: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900", "--max-crashes", "1")
    assert _end(several, capsys, RUNNING.format(0), "--max-crashes", "1") == (1, "cancel=42\n")


def test_a_run_that_was_stopped_is_not_taken_over_by_one_that_could_not_be_cancelled(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900")
    write_marker(several, "STOPPED", "user: at step 3 of 6")
    _end(several, capsys)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _main("begin", several, "--device", "cpu", "--queue", "42 RUNNING 1", "--stand-by", "900") == 1
    assert "job 41 of the same submission was stopped (user: at step 3" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "43")  # submitted by hand since
    assert _begin(several, capsys, "43 RUNNING 1", "--stand-by", "900")[0] == 0


def test_a_job_that_was_turned_away_since_does_not_hide_a_stop(
    several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900")
    write_marker(several, "STOPPED", "user: at step 3 of 6")
    _end(several, capsys)
    now = time.time()
    unstarted = {"job": "42", "first_step": 0, "began": now, "ended": now}
    for restart, how in enumerate(("refused", "crashed", "standby")):
        ledger.write_event(several, "unstarted", **unstarted, restart=restart, how=how)
    _attempt(monkeypatch, 3)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(several, capsys, "42 RUNNING 1", "--stand-by", "900") == (1, [])
    marker = read_marker(several)
    assert marker is not None
    assert marker.kind == "STOPPED"
    _attempt(monkeypatch, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "43")  # by hand, and its node died: the run was wanted again
    assert _begin(several, capsys, "43 RUNNING 1")[0] == 0
    _attempt(monkeypatch, 4)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(several, capsys, "42 RUNNING 1", "--stand-by", "900")[0] == 0


# nodes that are not fit -----------------------------------------------------------------------------


def test_a_node_that_is_not_fit_is_left_out_where_others_are(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    job = "JobId=41 JobState=RUNNING Restarts=0"
    words = ["--nodes", f"{KIND}|mixed|n[1-4]", "--unfit", "n2 n2: clock: 300.0 s ahead"]
    assert _end(run, capsys, job, *words) == (0, "requeue exclude=n2\n")
    (attempt,) = ledger.read_ledger(run).attempts
    assert (attempt.how, attempt.failed_nodes) == ("node_fail", "n2")
    assert attempt.reason == "doctor: n2: clock: 300.0 s ahead"


@pytest.mark.parametrize(
    ("unfit", "nodes"),
    [
        ("n2 n2: clock: 300.0 s ahead", "n[1-2]"),
        ("* n1: data: not prepared; n2: data: not prepared", "n[1-9]"),
    ],
)
def test_what_other_nodes_cannot_mend_ends_the_job(
    unfit: str, nodes: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(run, capsys)
    job = "JobId=41 JobState=RUNNING Restarts=0"
    assert _end(run, capsys, job, "--nodes", f"{KIND}|mixed|{nodes}", "--unfit", unfit) == (2, "")
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, unfit.partition(" ")[2] in marker.text) == ("REFUSED", True)
    assert "submit again once it is mended" in marker.text


@pytest.mark.parametrize("unfit", ["n2 n2: clock: 300.0 s ahead", "* n1: data: not prepared"])
def test_what_the_doctor_refuses_leaves_the_other_jobs_in_the_queue(
    unfit: str, several: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _begin(several, capsys, BOTH, "--stand-by", "900")
    words = ["--nodes", f"{KIND}|mixed|n[1-2]", "--unfit", unfit]
    assert _end(several, capsys, RUNNING.format(0), *words) == (2, "wake=42\n")
    _attempt(monkeypatch, 0, nodes=1)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert _begin(several, capsys, "42 RUNNING 1", "--stand-by", "900")[0] == 0
    assert read_marker(several) is None


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
    ledger.write_event(run, "start", job="41_0", restart=0, began=time.time(), first_step=0)
    monkeypatch.setenv("SLURM_JOB_ID", "41_1")
    queue, seen = "41_1 RUNNING 1\n41_0 RUNNING 1", ["--seen", ""]
    if meanwhile:  # it began while this one was asking what others do
        assert _begin(run, capsys, "41_1 RUNNING 1\n41_0 PENDING 1", *seen) == (0, ["ask 41_0.0 41_0,41_1"])
        seen = ["--seen", "41_0.0"]
    assert _begin(run, capsys, queue, *seen) == (1, [])
    refused = ledger.read_ledger(run).attempts[-1]
    assert (refused.job, refused.how) == ("41_1", "refused")
    assert "job 41_0 of this run is under way" in refused.reason
    assert "OPTIONS=(--name mine-$SLURM_ARRAY_TASK_ID)" in refused.reason
    # One after another (--array=0-1%1) they take turns.
    assert _begin(run, capsys, "41_1 RUNNING 1", "--seen", "41_0.0")[0] == 0


def test_outside_a_job_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert _main("begin", "embedded") == 2
    assert "SLURM_JOB_ID: is not set" in capsys.readouterr().err


@pytest.mark.parametrize("undecided", [False, True])
def test_another_number_of_gpus_than_planned_is_refused_before_anything_starts(
    undecided: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps({**plan, "device": "cuda", "gpu_memory": 0}))
    memory = 80 * 2**30 if undecided else None
    monkeypatch.setattr("launch.slurm.job_plan.gpu_memory", lambda: memory)
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
