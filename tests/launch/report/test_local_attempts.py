"""The attempts on this machine, from the lines that the trainer and the launcher write into their logs."""

import time
from pathlib import Path

from launch.report import words
from launch.report.local_attempts import local_attempts
from launch.run.directory import RunDirectory

_BEGIN = "02:15:14 [RANK 0] strategy ddp, world size 2, run /somewhere/runs/longer\n"
_STEPS = "step 10/40 loss 1.22 0.892 s/step 0:00:27 left\nstep 20/40 loss 1.045 0:00:19 left\n"
_LOGS = (
    _BEGIN + _STEPS + "12:00:00 the launcher ended with exit status 137; no marker was written\n",
    _BEGIN
    + "02:17:04 [RANK 0] resuming at step 20 of 40\nstep 30/40 loss 1 0:00:09 left\n"
    + "02:17:09 [RANK 0] stopped, Ctrl-C: at step 34 of 40; the same command goes on\n",
    _BEGIN + "error: [RANK 1] data: row 7: the image is corrupt\nerror: rank 0: is alone\n",
    _BEGIN + _STEPS,
    _BEGIN + "02:20:04 [RANK 0] resuming at step 34 of 40\nstep 40/40 loss 1 0:00:00 left\n",
    _BEGIN,
)


def test_every_start_is_told_with_its_steps_and_why_it_ended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert local_attempts(run, True) == []
    (tmp_path / "logs").mkdir()
    for minute, text in enumerate(_LOGS, 15):
        (tmp_path / "logs" / f"local-20261129-02{minute}14.log").write_text(text)
    attempts = local_attempts(run, is_running=True)
    assert [(each.how, each.first_step, each.last_step) for each in attempts] == [
        ("failed", 0, 20),
        ("stopped", 20, 34),
        ("failed", 0, 0),
        ("died", 0, 20),
        ("done", 34, 40),
        (None, 0, 0),
    ]
    reasons = [each.reason for each in attempts]
    assert reasons[0] == "the launcher ended with exit status 137"
    assert reasons[1] == "Ctrl-C"
    assert reasons[2] == "[RANK 1] data: row 7: the image is corrupt"
    assert reasons[3] == "left no word after step 20"
    assert {each.processes for each in attempts} == {"2 x ddp"}
    assert time.strftime("%H:%M:%S", time.localtime(attempts[0].began)) == "02:15:14"
    rows = words.attempt_rows((), attempts)
    assert rows[-1][0] == "local"
    assert rows[-1][3:] == ("from 0", "under way", "")
    assert local_attempts(run, is_running=False)[-1].how == "died"


def test_a_log_that_is_none_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "logs" / "local-yesterday.log").mkdir(parents=True)
    (tmp_path / "logs" / "local-20261129-021514.log").write_bytes(b"\xff\x00" * 100)
    broken, folder = local_attempts(RunDirectory(tmp_path), is_running=False)
    assert (broken.how, broken.reason) == ("died", "left no word after step 0")
    assert folder.how == "unknown"
    assert "cannot be read" in folder.reason
