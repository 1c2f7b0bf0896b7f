"""What `samestep status` and `samestep logs` say, from the run directory alone and with Slurm's word."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cli.monitor import _show_table
from launch.monitor.follow import follow
from launch.monitor.logs import log_files
from launch.monitor.status import Status, status_of
from launch.monitor.status_table import STATUS_COLUMNS, columns_for
from launch.run.directory import RunDirectory, write_marker
from launch.run.local_log import add_to_log
from launch.run.lock import hold_lock
from launch.slurm import attempts
from launch.slurm.output import JobFacts
from tests.helpers.attempts import attempt, recipe_of
from tests.helpers.launcher import samestep, stand_in

NOW = 1_800_000_000.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunDirectory:
    """A run of 37 steps of 8 samples, planned and not begun."""
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without Slurm
    found = RunDirectory(tmp_path / "runs" / "mine")
    attempt(found, recipe_of())
    return found


def _steps(run: RunDirectory, count: int, at: float = NOW) -> None:
    lines = [
        {"step": step, "loss": 1 / step, "samples": 8, "seconds": 9.0 if step == 1 else 2.0}
        for step in range(1, count + 1)
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    os.utime(run.metrics_file, (at, at))


def _started(run: RunDirectory, job: str = "7") -> None:
    attempts.write_event(run, "submit", job=job)
    attempts.write_event(run, "start", job=job, restart=0, began=NOW - 100, first_step=0, nodes="n1")


def _look(run: RunDirectory, *facts: str) -> Status:
    job = JobFacts(facts[0], facts[1], 0, True, "", "") if facts else None
    return status_of(run, lambda _: job, NOW)


def test_a_run_without_a_job_has_not_started(run: RunDirectory) -> None:
    assert (_look(run).state, _look(run).step, _look(run).max_steps) == ("not started", 0, 37)


def test_a_run_of_this_machine_that_nobody_holds_any_more_has_failed(run: RunDirectory) -> None:
    run.environment_file.write_text("{}")
    _steps(run, 3)
    found = _look(run)
    assert (found.state, found.step) == ("failed", 3)
    assert "the same command goes on" in found.because
    (run.path / "STOPPED").write_text("user: at step 3 of 37")
    assert _look(run).state == "stopped"


@pytest.mark.parametrize(
    ("ended", "state"), [("FAILED", "failed"), ("TIMEOUT", "failed"), ("CANCELLED", "stopped")]
)
def test_a_job_that_ended_before_it_began_the_run_is_not_called_queued(
    run: RunDirectory, ended: str, state: str
) -> None:
    attempts.write_event(run, "submit", job="7")
    found = _look(run, ended, "None")
    assert (found.state, found.because) == (
        state,
        f"job 7 is {ended} and never began; see its log, then submit again",
    )


def test_a_queued_run_says_why_it_waits_and_how_often_it_came_back(run: RunDirectory) -> None:
    attempts.write_event(run, "submit", job="7")
    assert _look(run).state == "queued"
    assert _look(run, "PENDING", "Priority").because == "Priority"
    _started(run)
    attempts.write_event(run, "end", how="preempted", last_step=3)
    found = _look(run, "PENDING", "BeginTime")
    assert (found.state, found.because, found.requeued, found.preempted) == (
        *("queued", "requeued 1 times, BeginTime", 1, 1),
    )


def test_a_running_run_shows_step_speed_loss_and_when_it_will_end(run: RunDirectory) -> None:
    attempt(run, recipe_of(), save=4)
    os.utime(run.checkpoint(4), (NOW - 60, NOW - 60))
    _started(run)
    _steps(run, 5)
    with hold_lock(run.path):
        found = _look(run)
    assert (found.state, found.step, found.loss) == ("running", 5, 0.2)
    assert found.samples_per_second == 4.0
    assert (found.checkpoint_step, found.checkpoint_age) == (4, 60)
    assert found.expected_end == NOW + 32 * 2
    assert _look(run, "RUNNING", "None").state == "running"


def test_a_run_without_a_step_for_long_is_stalled(run: RunDirectory) -> None:
    _started(run)
    _steps(run, 5, at=NOW - 3600)
    assert _look(run, "RUNNING", "None").state == "running"  # this attempt began 100 s ago
    file = attempts.ledger_file(run)
    file.write_text(file.read_text().replace(str(NOW - 100), str(NOW - 3500)))
    found = _look(run, "RUNNING", "None")
    assert (found.state, found.because) == ("stalled", "no step for 58 min")


def test_a_run_that_hangs_before_its_first_step_is_stalled_too(run: RunDirectory) -> None:
    _started(run)
    assert _look(run, "RUNNING", "None").state == "running"
    file = attempts.ledger_file(run)
    file.write_text(file.read_text().replace(str(NOW - 100), str(NOW - 3500)))
    assert _look(run, "RUNNING", "None").because == "no step for 58 min"
    attempts.write_event(run, "end", how="preempted", last_step=1)
    assert _look(run, "RUNNING", "None").state == "running"  # the next attempt has not begun


def test_a_run_without_a_job_that_hangs_is_stalled_as_well(run: RunDirectory) -> None:
    run.environment_file.write_text("{}")
    for at, state in ((NOW - 60, "running"), (NOW - 3600, "stalled")):
        os.utime(run.environment_file, (at, at))
        with hold_lock(run.path):
            assert _look(run).state == state


def test_an_attempt_that_has_just_begun_is_running_without_slurms_word(run: RunDirectory) -> None:
    _started(run)
    assert (_look(run).state, _look(run).because) == ("running", "job 7 began 1 min ago, by the ledger alone")


def test_what_the_ledger_gave_up_is_failed_whatever_the_last_trainer_said(run: RunDirectory) -> None:
    write_marker(run, "STOPPED", "preempted: at step 0 of 37")
    for restart in range(3):
        attempts.write_event(run, "start", job="7", restart=restart, began=NOW, first_step=0)
        assert _look(run, "RUNNING", "None").state == "running"
        attempts.write_event(run, "end", how="preempted", last_step=0)
    assert _look(run, "FAILED", "None").state == "failed"
    assert _look(run).because.startswith("job 7: no step was saved in 3 attempts in a row")
    facts = {"job": "7", "restart": 3, "began": 2.0, "first_step": 0, "how": "refused", "ended": 2.0}
    attempts.write_event(run, "unstarted", reason="no room", **facts)
    assert (_look(run).state, _look(run).because) == ("failed", "job 7: no room")


@pytest.mark.parametrize(
    ("kind", "text", "state"),
    [
        ("DONE", "step 37", "done"),
        ("REFUSED", "lora.r: bad", "failed"),
        ("STOPPED", "user: at step 3 of 37", "stopped"),
    ],
)
def test_the_marker_says_how_a_run_ended(kind: str, text: str, state: str, run: RunDirectory) -> None:
    write_marker(run, kind, text)  # type: ignore[arg-type]
    assert (_look(run).state, _look(run).because) == (state, text)


def test_a_failed_run_says_why(run: RunDirectory) -> None:
    _started(run)
    assert _look(run, "NODE_FAIL", "None").because == "its job 7 is NODE_FAIL"
    file = attempts.ledger_file(run)
    file.write_text(file.read_text().replace(str(NOW - 100), str(NOW - 400)))
    assert _look(run).because == "job 7 left no word, and nobody holds it"
    for restart in range(3):
        attempts.write_event(run, "end", how="crashed", last_step=0, reason="x")
        assert _look(run).state == "failed"
        attempts.write_event(run, "start", job="7", restart=restart + 1, began=1.0, first_step=0)
    attempts.write_event(run, "end", how="crashed", last_step=0, reason="x")
    assert "no step was saved in 4 attempts in a row" in _look(run).because


def test_damaged_files_are_no_reason_to_say_nothing(run: RunDirectory) -> None:
    _steps(run, 2)
    run.plan_file.write_text("{")
    run.checkpoint(3).mkdir()
    found = _look(run)
    assert (found.step, found.max_steps, found.checkpoint_step) == (2, None, None)


def test_the_command_shows_all_runs_or_those_named(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    attempt(RunDirectory(run.path.with_name("other")), recipe_of())
    write_marker(run, "DONE", "step 37")
    assert samestep("status") == 0
    told = capsys.readouterr().out
    assert "done (step 37)" in told
    assert "other" in told
    assert samestep("status", "mine", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["requeued"]) == ("mine", "done", 0)
    assert samestep("status", "nobody") == 2


def _columns(shown: str) -> dict[str, str]:
    """The text of each column below the header, its lines put together again."""
    lines = [line for line in shown.splitlines() if line.startswith(("\u2502", "\u2503"))]
    names, *rows = [[cell.strip() for cell in re.split("[\u2502\u2503]", line)[1:-1]] for line in lines]
    return {name: "".join(row[number] for row in rows) for number, name in enumerate(names)}


@pytest.mark.parametrize("name", ["mine", "qwen2vl-7b-chartqa-lr1e-4-rank-16-second-try", "x" * 100])
def test_a_narrow_terminal_shows_names_and_reasons_whole_and_says_what_it_leaves_out(
    name: str, run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = f"data.train: /a/{'long/' * 20}folder is gone (0 files); mend it\nlora.r: 0 is too small; give 1 or more"
    other = RunDirectory(run.path.with_name(name))
    attempt(other, recipe_of(), save=4)
    _steps(other, 5)
    write_marker(other, "REFUSED", reason)
    monkeypatch.setenv("COLUMNS", "80")
    assert samestep("status", name) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    found = _columns(shown)
    assert found["run"] == name
    assert found["state"].replace(" ", "") == f"failed ({reason})".replace(" ", "").replace("\n", "")
    assert found["step"] == "5 of 37"
    needed = re.search(r"not shown: .*checkpoint.* \(all need a terminal of (\d+) ", " ".join(shown.split()))
    assert needed
    for width, is_whole in ((int(needed[1]) - 1, False), (int(needed[1]), True)):
        monkeypatch.setenv("COLUMNS", str(width))
        assert samestep("status", name) == 0
        assert ("not shown" not in capsys.readouterr().out) is is_whole
    monkeypatch.setenv("COLUMNS", "300")
    assert samestep("status", name) == 0
    shown = capsys.readouterr().out
    assert "not shown" not in shown
    assert {*_columns(shown)} == {*STATUS_COLUMNS}


def test_columns_that_say_nothing_are_left_out_before_those_that_do() -> None:
    def kept(width: int, state: str, end: str) -> list[str]:
        cells = ["mine", state, "37 of 370", "4.00", "0.2", "step 37, 2 h ago", end, "-"]
        return [STATUS_COLUMNS[column] for column in columns_for(width, [cells])]

    always = ["run", "state", "step"]
    assert kept(80, "done (step 37)", "-") == [*always, "samples/s", "loss", "checkpoint"]
    assert kept(80, "running (process 12 on a)", "in 3 h") == [*always, "loss", "checkpoint", "expected end"]
    assert kept(80, f"failed ({'a long reason ' * 20})", "-") == [*always, "loss"]
    assert kept(20, "done (step 37)", "-") == always


def test_the_table_of_a_running_job_has_its_loss_and_end_in_a_terminal_of_80(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, state, step = "qwen2vl-7b-chartqa", "running (job 1234567 (running))", "1,234 of 12,345"
    monkeypatch.setenv("COLUMNS", "80")
    _show_table([(name, state, step, "12.34", "0.1234", "step 1200, 3 min ago", "in 3 h", "-")])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert f"\u2502 {name} \u2502" in shown  # in one line
    found = _columns(shown)
    assert (found["loss"], found["expected end"], found["step"]) == ("0.1234", "in 3 h", step)
    assert found["state"].replace(" ", "") == state.replace(" ", "")
    assert "not shown: samples/s, checkpoint (all need a terminal of " in shown
    _show_table([(name, state, step, "-", "0.1234", "-", "in 3 h", "-")])
    assert "not shown" not in capsys.readouterr().out


def test_logs_are_those_of_the_newest_job_or_of_a_rank(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("logs", "mine") == 2
    assert "no log, and no job of a cluster has had this run" in capsys.readouterr().err
    attempts.write_event(run, "submit", job="7")
    assert samestep("logs", "mine") == 2
    assert "no log yet" in capsys.readouterr().err
    logs = run.path / "logs"
    for number, text in (("7", "old"), ("8", "new")):
        attempts.write_event(run, "submit", job=number)
        logs.mkdir(exist_ok=True)
        (logs / f"{number}.out").write_text(text)
        os.utime(logs / f"{number}.out", (int(number), int(number)))
    assert samestep("logs", "mine") == 0
    assert capsys.readouterr().out == "new"
    assert samestep("logs", "mine", "--rank", "0") == 0  # one process: the job's log is the rank's
    assert capsys.readouterr().out == "new"
    assert samestep("logs", "mine", "--rank", "1") == 2
    plan = (
        run.plan_file.read_text().replace('"single"', '"ddp"').replace('"world_size": 1', '"world_size": 4')
    )
    run.plan_file.write_text(
        plan.replace('"gpus_per_node": 1', '"gpus_per_node": 2').replace('"nodes": 1', '"nodes": 2')
    )
    for attempt_of, text in (("8.9", "before"), ("8.10", "rank 3")):
        place = logs / attempt_of / "node-1" / "x" / "attempt_0" / "1"
        place.mkdir(parents=True)
        (place / "stderr.log").write_text(text)
    assert samestep("logs", "mine", "--rank", "3") == 0
    assert capsys.readouterr().out == "rank 3"


def test_logs_of_a_run_of_this_machine_are_those_of_its_newest_attempt(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = run.path / "logs"
    logs.mkdir()
    (logs / "local-20260101-000000.log").write_text("first\n")
    (logs / "local-20260102-000000.log").write_text("second\n")
    assert samestep("logs", "mine") == 0
    assert capsys.readouterr().out == "second\n"
    began = time.time()
    os.utime(logs / "local-20260102-000000.log", (began - 9, began - 9))
    add_to_log(run, "of another attempt", began)
    add_to_log(run, "ended", began - 10)
    assert samestep("logs", "mine") == 0
    second, ended = capsys.readouterr().out.splitlines()
    assert second == "second"
    assert ended.endswith(" ended")
    (logs / "local-20260103-000000.log").symlink_to("/etc/hostname")
    assert samestep("logs", "mine") == 2


def _following(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, happens: dict[int, Callable[[], object]]
) -> None:
    """Let things happen in the pauses of `samestep logs --follow`, by their number; too many are a failure."""
    pauses = itertools.count(1)

    def pause(_: float) -> None:
        number = next(pauses)
        assert number < 100, "follows for ever"
        happens.get(number, lambda: None)()

    monkeypatch.setattr("launch.monitor.follow.time.sleep", pause)
    attempts.write_event(run, "submit", job="7")
    (run.path / "logs").mkdir()


def _say(run: RunDirectory, words: str, job: str = "7") -> Callable[[], object]:
    def write() -> None:
        with (run.path / "logs" / f"{job}.out").open("a") as log:
            log.write(words)

    return write


def test_following_waits_for_the_first_word_and_ends_with_the_run(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        _say(run, "last words\n")()
        write_marker(run, "DONE", "step 37")

    happens = {
        7: lambda: attempts.write_event(run, "start", job="7", restart=0, began=time.time(), first_step=0)
    }
    _following(run, monkeypatch, {**happens, 8: _say(run, "one\n"), 12: _say(run, "two\n"), 30: end})
    assert samestep("logs", "mine", "--follow") == 0
    told = capsys.readouterr()
    assert told.out == "one\ntwo\nlast words\n"
    assert told.err.splitlines() == [
        "mine: no log yet, waiting for job 7 to begin: queued (job 7, by the ledger alone)",
        "mine: done (step 37)",
    ]


def test_following_outlives_a_moment_in_which_nobody_has_the_run_and_goes_on_with_the_next_job(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def requeue() -> None:
        (run.path / "STOPPED").unlink()
        attempts.write_event(run, "submit", job="8")

    stopped = lambda: write_marker(run, "STOPPED", "preempted: at step 3 of 37")  # noqa: E731
    started = lambda: attempts.write_event(run, "start", job="7", restart=0, began=time.time(), first_step=0)  # noqa: E731
    happens = {1: started, 2: _say(run, "before\n"), 4: stopped, 6: requeue, 9: _say(run, "after\n", "8")}
    _following(run, monkeypatch, {**happens, 20: lambda: write_marker(run, "REFUSED", "lora.r: bad")})
    assert samestep("logs", "mine", "--follow") == 0
    told = capsys.readouterr()
    assert told.out == "before\nafter\n"
    assert told.err.splitlines()[-1] == "mine: failed (lora.r: bad)"


def test_following_ends_when_the_run_ends_without_a_word_or_never_had_a_job(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert samestep("logs", "mine", "--follow") == 2  # nothing to wait for
    assert "no job of a cluster has had this run" in capsys.readouterr().err
    _following(run, monkeypatch, {3: lambda: write_marker(run, "REFUSED", "lora.r: bad")})
    assert samestep("logs", "mine", "--follow") == 2
    how, why = capsys.readouterr().err.splitlines()[-2:]
    assert how == "mine: failed (lora.r: bad)"
    assert "no log, the end came before the first word" in why


def test_following_says_how_a_job_ended_that_died_before_its_first_word(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "launch.slurm.commands.show_job", lambda _: JobFacts("NODE_FAIL", "None", 0, True, "", "")
    )
    _following(run, monkeypatch, {})
    assert samestep("logs", "mine", "--follow") == 2
    how, why = capsys.readouterr().err.splitlines()
    assert how.startswith("mine: failed (job 7 is NODE_FAIL and never began")
    assert "no log, the end came before the first word" in why
    (run.path / "logs" / "7.out").write_text("words of the job\n")
    plan = run.plan_file.read_text().replace('"single"', '"ddp"')
    run.plan_file.write_text(plan)
    assert samestep("logs", "mine", "--follow", "--rank", "0") == 2
    assert "no log of rank 0, the end came before its first word" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_following_outlives_the_marker_until_the_job_has_said_its_last_words(
    state: str, run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [state]
    monkeypatch.setattr(
        "launch.slurm.commands.show_job", lambda _: JobFacts(states[-1], "None", 0, True, "", "")
    )
    happens = {2: lambda: write_marker(run, "DONE", "step 37"), 40: _say(run, "done at step 37\n")}
    _following(run, monkeypatch, {1: _say(run, "one\n"), **happens, 41: lambda: states.append("COMPLETED")})
    assert samestep("logs", "mine", "--follow") == 0
    told = capsys.readouterr()
    assert told.out == "one\ndone at step 37\n"
    assert told.err.splitlines()[-1] == "mine: done (step 37)"


def test_following_outlives_the_marker_while_the_lock_of_the_run_is_held(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as held:
        held.enter_context(hold_lock(run.path))
        happens = {2: lambda: write_marker(run, "DONE", "step 37"), 40: _say(run, "last\n"), 41: held.close}
        _following(run, monkeypatch, {1: _say(run, "one\n"), **happens})
        assert samestep("logs", "mine", "--follow") == 0
    assert capsys.readouterr().out == "one\nlast\n"


def test_following_outlives_a_shared_disk_that_does_not_answer_and_repeats_nothing(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, broken = run.path / "logs" / "7.out", {"open": False, "stat": False}

    def breaking(method: str) -> Callable[..., object]:
        real = getattr(Path, method)

        def call(path: Path, *given: object, **named: object) -> object:
            if broken[method] and path == log:
                raise OSError(errno.ESTALE, "Stale file handle")
            return real(path, *given, **named)

        return call

    for method in broken:
        monkeypatch.setattr(Path, method, breaking(method))
    happens = {
        1: _say(run, "one\n"),
        4: lambda: broken.update(open=True),
        8: lambda: broken.update(open=False),
    }
    happens |= {9: lambda: broken.update(stat=True), 12: lambda: broken.update(stat=False)}
    happens |= {20: _say(run, "two\n"), 30: lambda: write_marker(run, "DONE", "step 37")}
    _following(run, monkeypatch, happens)
    assert samestep("logs", "mine", "--follow") == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_log_that_vanishes_between_two_looks_at_it_is_passed_over(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts.write_event(run, "submit", job="7")
    (run.path / "logs").mkdir()
    _say(run, "one\n")()
    real = Path.stat

    def vanishing(path: Path, *given: object, **named: object) -> object:
        facts = real(path, *given, **named)  # type: ignore[arg-type]
        if path.name == "7.out":
            path.unlink()
        return facts

    monkeypatch.setattr(Path, "stat", vanishing)
    log_files(run, None)
    assert log_files(run, None) == []


def test_following_ends_when_nobody_reads_any_more() -> None:
    def closed(_: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(lambda: [Path(__file__)], lambda: None, closed, lambda: None)


@pytest.mark.parametrize("of", [[], ["--rank", "0"]], ids=["job", "rank"])
def test_following_ends_when_the_folder_of_the_run_is_moved_away(
    of: list[str], run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def move() -> None:
        run.path.rename(run.path.with_name("elsewhere"))

    _following(run, monkeypatch, {7: move})
    _say(run, "one\n")()
    assert samestep("logs", "mine", "--follow", *of) == 0
    told = capsys.readouterr()
    assert told.out == "one\n"
    assert told.err == f"mine: its folder is gone ({run.path})\n"


def test_a_status_is_json_with_plain_names() -> None:
    status = Status("a", "done", "", None, "", 1, 1, None, None, None, None, None, 1, 2, 3, 4)
    assert replace(status, step=2).to_json()["requeued"] == 10
