"""Wishes from outside: what one rank knows, and what all agree on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.errors import RunError
from launch.run.directory import RunDirectory, request_stop
from trainer.distributed.stop_requests import (
    FLAGS,
    REASONS,
    AgreedRequests,
    StopRequests,
    handle_stop_requests,
    warn_of_slow_save,
)


def _raised_flags(requests: StopRequests) -> set[str]:
    return {flag for flag, count in zip(FLAGS, requests.flags(), strict=True) if count}


def _sums(*wishes: str) -> list[float]:
    return [float(wishes.count(wish)) for wish in FLAGS]


def test_nobody_wishes_anything_by_itself(tmp_path: Path) -> None:
    requests = StopRequests(RunDirectory(tmp_path), 0, os.getppid())
    assert _raised_flags(requests) == set()
    assert requests.agree() == AgreedRequests(None, False, False)


@pytest.mark.parametrize("reason", REASONS)
def test_one_rank_is_enough_for_all_to_stop(reason: str) -> None:
    assert AgreedRequests.of(_sums(reason)) == AgreedRequests(reason, False, False)  # type: ignore[arg-type]


def test_what_somebody_wants_goes_before_what_the_scheduler_wants() -> None:
    assert AgreedRequests.of(_sums("orphaned", "time", "preempted", "user", "user")).stop == "user"
    assert AgreedRequests.of(_sums("orphaned", "terminated", "time", "preempted")).stop == "preempted"
    assert AgreedRequests.of(_sums("save", "save")) == AgreedRequests(None, True, False)
    assert AgreedRequests.of(_sums("fail")) == AgreedRequests(None, False, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("time\n", "time"), ("preempted: by a job", "preempted"), ("", "user"), ("please", "user")],
)
def test_the_stop_file_holds_its_reason(tmp_path: Path, text: str, reason: str) -> None:
    run = RunDirectory(tmp_path)
    run.stop_file.write_text(text)
    assert _raised_flags(StopRequests(run, 0, os.getppid())) == {reason}
    assert _raised_flags(StopRequests(run, 1, os.getppid())) == set()  # rank 0 looks for all


def test_an_earlier_stop_request_keeps_its_reason(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    request_stop(run, "user")
    request_stop(run, "preempted")
    assert _raised_flags(StopRequests(run, 0, os.getppid())) == {"user"}
    assert [file.name for file in tmp_path.iterdir()] == ["STOP"]


def test_a_save_file_is_a_wish_to_save(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.save_file.touch()
    assert _raised_flags(StopRequests(run, 0, os.getppid())) == {"save"}


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGINT, "user"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "user")],
)
def test_signals_are_requests_while_they_are_handled(
    tmp_path: Path, number: signal.Signals, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SAMESTEP_STOP_LEAD"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(number)
    with handle_stop_requests(RunDirectory(tmp_path), 1, os.getppid()) as requests:
        os.kill(os.getpid(), number)
        assert _raised_flags(requests) == {reason}
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "from launch.run.directory import RunDirectory\n"
        "from trainer.distributed.stop_requests import FLAGS, StopRequests, handle_stop_requests\n"
        "with handle_stop_requests(RunDirectory(Path(sys.argv[1])), 0, os.getppid()) as requests:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05); print(requests.flags(), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 20
    while "1.0" not in process.stdout.readline():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_a_worker_whose_parent_is_gone_wants_to_stop(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "from launch.run.directory import RunDirectory\n"
        "from trainer.distributed.stop_requests import FLAGS, StopRequests, handle_stop_requests\n"
        "there, here = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    requests = StopRequests(RunDirectory(Path(sys.argv[1])), 1, os.getppid())\n"
        "    before = requests.flags(); os.write(here, b'x')\n"
        "    while os.getppid() == requests._parent: time.sleep(0.01)\n"
        "    print(sum(before), FLAGS[requests.flags().index(1.0)], flush=True); os._exit(0)\n"
        "os.read(there, 1); os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "0.0 orphaned\n", done.stderr


def test_a_failure_is_said_with_its_file_and_known_to_be_common(tmp_path: Path) -> None:
    requests = StopRequests(RunDirectory(tmp_path), 0, os.getppid())
    requests.raise_failure()
    requests.fail(OSError(28, "No space left on device", "metrics.jsonl"))
    requests.fail(ValueError("the first is what counts"))
    assert _raised_flags(requests) == {"fail"}
    with pytest.raises(
        RunError, match=r"metrics\.jsonl: No space left on device \(disk at .* free\); make room"
    ) as raised:
        requests.raise_failure()
    assert not raised.value.agreed
    assert requests.agreed_failure().agreed
    assert "metrics.jsonl" in str(requests.agreed_failure())


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "SAMESTEP_STOP_LEAD"])
def test_a_sigterm_in_a_job_is_the_schedulers(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "60")
    with handle_stop_requests(RunDirectory(tmp_path), 1, os.getppid()) as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert _raised_flags(requests) == {"preempted"}


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_stop_requests(RunDirectory(tmp_path), 1, os.getppid()) as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert _raised_flags(requests) == set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_called_stop_or_save_is_no_request(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.stop_file.mkdir()
    run.save_file.mkdir()
    assert _raised_flags(StopRequests(run, 0, os.getppid())) == set()


def test_a_save_of_more_than_half_the_warning_time_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAMESTEP_STOP_LEAD", raising=False)
    assert warn_of_slow_save(1e6) is None
    monkeypatch.setenv("SAMESTEP_STOP_LEAD", "120")
    assert warn_of_slow_save(60.0) is None
    assert warn_of_slow_save(61.0) == (
        "a save took 61.0 s, more than half of the 120 s of warning before the time limit; "
        "submit with a longer --signal-lead"
    )
