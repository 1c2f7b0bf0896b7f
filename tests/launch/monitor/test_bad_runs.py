"""`samestep status` and `samestep logs` of folders that others wrote: one bad run is one row, never the end of all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import get_args

import pytest

from launch.atomic_files import atomic_write
from launch.errors import ConfigError
from launch.monitor import status
from launch.monitor.logs import log_files
from launch.monitor.status import runs_below, status_of
from launch.monitor.status_table import row
from launch.run.directory import MarkerKind, RunDirectory, write_marker
from launch.run.lock import refuse_if_running
from launch.slurm import attempts
from launch.untrusted_files import UntrustedFileError
from tests.helpers.attempts import attempt, recipe_of
from tests.helpers.checkpoints import as_nobody
from tests.helpers.launcher import samestep, stand_in

NOW = 1_800_000_000.0
STEP = {"step": 3, "loss": 0.5, "samples": 8, "seconds": 2.0}
DEEP = "[" * 100_000


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunDirectory:
    """A run of 37 steps that has taken 3, on a machine without Slurm, beside a good one."""
    stand_in(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("good", "mine"):
        found = RunDirectory(tmp_path / "runs" / name)
        attempt(found, recipe_of())
        found.environment_file.write_text("{}")
        found.metrics_file.write_text(json.dumps(STEP) + "\n")
    return found


def _look(run: RunDirectory) -> status.Status:
    return status_of(run, lambda _: None, NOW)


def _fifo(name: str) -> Callable[[RunDirectory], object]:
    return lambda run: ((run.path / name).unlink(missing_ok=True), os.mkfifo(run.path / name))


HARMS: dict[str, tuple[Callable[[RunDirectory], object], str]] = {
    "a marker of random bytes": (lambda run: (run.path / "DONE").write_bytes(b"\xff\x00\x9b"), "is no UTF-8 text"),
    "a marker that is a folder": (lambda run: (run.path / "STOPPED").mkdir(), "is no plain file (a folder)"),
    "a marker that is a pipe": (_fifo("DONE"), "is no plain file (a device, pipe or socket)"),
    "a marker that is a device": (lambda run: (run.path / "DONE").symlink_to("/dev/zero"), "is no plain file"),
    "an endless marker": (lambda run: os.truncate(_touch(run.path / "DONE"), 2**40), "is too large"),
    "a ledger that is a folder": (lambda run: attempts.ledger_file(run).mkdir(), "is no plain file (a folder)"),
    "a ledger that is a pipe": (_fifo("ledger.jsonl"), "is no plain file"),
    "a lock that is a folder": (lambda run: (run.path / ".lock").mkdir(), "is no lock of samestep"),
}  # fmt: skip


def _touch(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(("harm", "words"), HARMS.values(), ids=HARMS)
def test_what_is_wrong_with_a_run_is_said_in_its_own_row(
    harm: Callable[[RunDirectory], object],
    words: str,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(run)
    found = _look(run)
    assert (found.state, words in found.because) == ("unknown", True)
    assert samestep("status", "--json", "--runs-dir", str(run.path.parent)) == 0
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["run"], good["state"], good["step"]) == ("good", "failed", 3)
    assert (bad["run"], bad["state"]) == ("mine", "unknown")
    assert samestep("status", "--runs-dir", str(run.path.parent)) == 0


@pytest.mark.parametrize(
    "line",
    [
        {**STEP, "seconds": None},
        {**STEP, "seconds": "2"},
        {**STEP, "seconds": float("inf")},
        {**STEP, "samples": float("nan")},
        {**STEP, "step": None},
        {**STEP, "loss": []},
        '{"step": 1e999, "loss": 1, "samples": 1, "seconds": 1}',
        '{"step": 9' + "9" * 5000 + ', "loss": 1, "samples": 1, "seconds": 1}',
        DEEP,
        '{"a":' * 900,
    ],
    ids=lambda line: str(line)[:30],
)
def test_a_line_of_the_metrics_that_no_trainer_writes_is_passed_over(
    line: dict[str, object] | str, run: RunDirectory
) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    run.metrics_file.write_text(f"{json.dumps(STEP)}\n{text}\n{json.dumps({**STEP, 'step': 4})}\n")
    found = _look(run)
    assert (found.state, found.step, found.samples_per_second) == ("failed", 4, 4.0)
    assert row(found, NOW)


def test_metrics_that_are_no_plain_file_are_none(run: RunDirectory) -> None:
    _fifo("metrics.jsonl")(run)
    assert _look(run).step == 0


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"event": "submit", "job": "7\\u0000"}',
        '{"event": "submit", "job": "--all"}',
        '{"event": "submit", "job": "../../x"}',
        '{"event": "start", "job": "7", "restart": 0, "began": 1e999, "first_step": 0}',
        '{"event": "start", "job": "7", "restart": 0, "began": NaN, "first_step": 0}',
        '{"event": "start", "job": "7", "restart": 1' + "0" * 5000 + ', "began": 1.0, "first_step": 0}',
    ],
    ids=lambda line: line[:60],
)
def test_a_line_of_the_ledger_that_no_job_writes_is_passed_over(line: str, run: RunDirectory) -> None:
    attempts.write_event(run, "submit", job="41")
    with attempts.ledger_file(run).open("a") as file:
        file.write(line + "\n")
    assert attempts.read_ledger(run) == attempts.Ledger(submitted=("41",))
    assert _look(run).state == "queued"


def test_a_folder_that_is_not_for_us_to_read_is_a_row(run: RunDirectory) -> None:
    run.path.chmod(0o700)
    for path in (run.path.parent / "good").rglob("*"):
        path.chmod(0o644)
    with chdir(run.path.parent), as_nobody():
        names = [one.name for one in runs_below(Path())]
        rows = {name: _look(RunDirectory(Path(name))) for name in names}
    assert (rows["good"].state, rows["good"].step) == ("failed", 3)
    assert (rows["mine"].state, rows["mine"].because.partition(" (")[2]) == ("unknown", "Permission denied)")


def test_whatever_a_folder_holds_the_others_are_shown(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_samples_per_second", lambda steps: 1 / 0)
    assert (_look(run).state, _look(run).because) == ("unknown", "ZeroDivisionError: division by zero")


# locks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_status_works_and_a_run_is_one_line(
    number: int, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path / ".lock").touch()

    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without)
    found = _look(run)
    assert (found.state, found.step) == ("unknown", 3)
    assert f"cannot be locked ({os.strerror(number)})" in found.because
    write_marker(run, "STOPPED", "user: at step 3 of 37")
    assert _look(run).state == "stopped"
    with pytest.raises(ConfigError, match="cannot be locked"):
        refuse_if_running(run)
    command = ("run", "embedded", "--name", "mine", "--runs-dir", str(run.path.parent))
    assert samestep(*command, "--gpus-per-node", "1") == 2
    said = capsys.readouterr().err
    assert f"{run.path / '.lock'}: cannot be locked" in said
    assert "Traceback" not in said


# logs -------------------------------------------------------------------------------------------


def _began(run: RunDirectory, log: Path | str, job: str = "7") -> None:
    attempts.write_event(
        run, "start", job=job, restart=0, began=NOW - 100, first_step=0, nodes="n1", log=str(log)
    )


@pytest.mark.parametrize("log", ["/etc/shadow", "/etc/passwd", "{}/../secret", "{}/logs/7.out"])
def test_a_log_that_is_none_of_the_jobs_is_not_shown(
    log: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.path.parent / "secret").write_text("root:hidden")
    (run.path / "logs").mkdir()
    (run.path / "logs" / "7.out").symlink_to(run.path.parent / "secret")
    _began(run, log.format(run.path))
    for follow in ([], ["--follow"]):
        assert samestep("logs", str(run.path), *follow) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert re.fullmatch(r".*ledger\.jsonl: names a log that is none of job 7's \(.*\n", said.err)


def test_the_log_of_a_plain_sbatch_is_shown_where_slurm_wrote_it(run: RunDirectory, tmp_path: Path) -> None:
    log = tmp_path / "slurm-7.out"
    log.write_text("words")
    _began(run, log)
    assert log_files(run, None) == [log]
    _began(run, tmp_path / "slurm-17.out", job="8")
    (tmp_path / "slurm-17.out").write_text("of another job")
    os.utime(tmp_path / "slurm-17.out", (NOW, NOW))
    with pytest.raises(UntrustedFileError, match="none of job 8's"):
        log_files(run, None)


def test_a_log_of_a_rank_that_leads_out_of_the_run_is_not_shown(run: RunDirectory, tmp_path: Path) -> None:
    text = run.plan_file.read_text()
    values = json.loads(text) | {"strategy": "ddp", "world_size": 2, "gpus_per_node": 2}
    run.plan_file.write_text(json.dumps(values))
    place = run.path / "logs" / "7.0" / "node-0" / "x" / "attempt_0" / "1"
    place.mkdir(parents=True)
    (place / "stdout.log").write_text("words")
    assert log_files(run, 1) == [place / "stdout.log"]
    (place / "stderr.log").symlink_to("/etc/passwd")
    with pytest.raises(UntrustedFileError, match="names a file outside of it"):
        log_files(run, 1)


def test_what_is_written_into_a_run_follows_no_link(run: RunDirectory, tmp_path: Path) -> None:
    """Whoever may write to a group's folder of runs must not write to its members' files."""
    victim = tmp_path / "victim"
    victim.write_text("dear to us")
    for name in (*get_args(MarkerKind), "STOP", "plan.json", ".attempt", "submit.sbatch"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(victim)
        atomic_write(run.path / name, "ours")
        assert not (run.path / name).is_symlink()
    attempts.ledger_file(run).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        attempts.write_event(run, "submit", job="7")
    assert victim.read_text() == "dear to us"
    written = "\n".join(file.read_text() for file in Path(__file__).parents[3].glob("launch/**/*.py"))
    assert ".write_text(" not in written


# what is printed --------------------------------------------------------------------------------


def test_nothing_in_a_table_or_a_line_moves_the_terminal(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    odd = RunDirectory(run.path.parent / f"[old]{evil}")
    run.path.rename(odd.path)
    write_marker(odd, "STOPPED", f"user {evil} [/old] at\nstep 3")
    for columns in ("400", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        assert samestep("status", "--runs-dir", str(run.path.parent)) == 0
        said = capsys.readouterr().out
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*said}
    monkeypatch.setenv("COLUMNS", "400")
    assert samestep("status", "--runs-dir", str(run.path.parent)) == 0
    said = capsys.readouterr().out
    assert r"[old]\x1b]0;owned\x07\x9b2J\u202e" in said
    for command in (["status", f"no{evil}"], ["plan", f"no{evil}"], ["checkpoints", f"no{evil}"]):
        assert samestep(*command) == 2
        said = capsys.readouterr().err
        assert r"no\x1b]0;owned\x07\x9b2J\u202e" in said
        assert "\x1b" not in said


def test_a_long_reason_is_cut(run: RunDirectory) -> None:
    write_marker(run, "REFUSED", "x" * 100_000)
    assert len(row(_look(run), NOW)[1]) < 1100


def test_a_name_longer_than_a_name_may_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert samestep("plan", "x" * 300) == 2
    assert "too long" in capsys.readouterr().err
    assert time.monotonic() - began < 20
