"""The run directory: names, markers, what is asked of a run, and one writer at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from launch.errors import ConfigError
from launch.run.directory import (
    RunDirectory,
    StopReason,
    clear_markers,
    clear_requests,
    is_done_at,
    open_run,
    read_marker,
    request_stop,
    requested_stop,
    write_marker,
    write_stopped,
)
from launch.run.lock import hold_lock, lock_holder, refuse_if_running
from tests.helpers.checkpoints import as_nobody

HOLD = "import sys; from pathlib import Path; from launch.run.lock import hold_lock\n"


@pytest.mark.parametrize("name", ["a", "qwen2vl-7b", "A.b_c-1", "7"])
def test_a_plain_name_is_a_folder_below_the_runs(name: str, tmp_path: Path) -> None:
    run = open_run(tmp_path, name)
    assert (run.path, run.name) == (tmp_path / name, name)
    assert not run.path.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "-x", "a b", "a\n", "x" * 101, "ü"]
)
def test_a_name_that_could_leave_the_runs_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--name"):
        open_run(tmp_path, name)


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in (
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-3",
        "checkpoint-x",
        ".checkpoint-7",
        "adapter",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    run = RunDirectory(tmp_path)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert run.checkpoint(20) == run.checkpoints()[1]
    assert RunDirectory(tmp_path / "none").checkpoints() == []


def test_a_run_has_one_marker_the_last(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert read_marker(run) is None
    write_marker(run, "REFUSED", "no such thing\nand another")
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, marker.text) == ("REFUSED", "no such thing\nand another")
    write_marker(run, "DONE")
    marker = read_marker(run)
    assert marker is not None
    assert marker.kind == "DONE"
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]
    clear_markers(run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_a_stop_is_asked_for_with_its_reason_and_answered(reason: StopReason, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert requested_stop(run) is None
    request_stop(run, reason)
    assert requested_stop(run) == reason
    run.save_file.touch()
    assert clear_requests(run) == reason
    assert requested_stop(run) is None
    assert list(tmp_path.iterdir()) == []
    assert clear_requests(run) is None


@pytest.mark.parametrize("reason", get_args(StopReason))
def test_a_stop_of_the_user_that_comes_during_another_one_is_the_one_that_is_answered(
    reason: StopReason, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    request_stop(run, reason)
    run.stop_file.write_text("user\n")  # while the last checkpoint is written
    write_stopped(run, reason, "at step 3 of 6")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        ("STOPPED", "user: at step 3 of 6")
    ]
    request_stop(run, "preempted")
    write_stopped(run, reason, "at step 4 of 6")
    assert (tmp_path / "STOPPED").read_text() == f"{reason}: at step 4 of 6"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "user"),
        (b"\n\n", "user"),
        (b"time", "time"),
        (b"  Preempted: node 7 goes down\n", "preempted"),
        (b"why not\n", "user"),
        (b"\xff\xfe\0", "user"),
        (b"x" * 1_000_000 + b" time", "user"),
    ],
)
def test_whatever_somebody_writes_into_the_stop_file_is_a_stop(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    run.stop_file.write_bytes(content)
    assert requested_stop(run) == reason


def test_an_earlier_stop_keeps_its_reason(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    request_stop(run, "time")
    request_stop(run, "user")
    assert requested_stop(run) == "time"
    assert [file.name for file in tmp_path.iterdir()] == ["STOP"]


def test_a_request_that_interrupts_the_writing_of_another_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a TERM does that arrives while the handler of a Ctrl-C is at work."""
    run, write = RunDirectory(tmp_path), Path.write_text

    def interrupted(path: Path, text: str, encoding: str) -> int:
        monkeypatch.undo()
        written = write(path, text, encoding)
        request_stop(run, "preempted")
        return written

    monkeypatch.setattr(Path, "write_text", interrupted)
    request_stop(run, "user")
    assert requested_stop(run) in ("user", "preempted")
    assert [file.name for file in tmp_path.iterdir()] == ["STOP"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_plain_file_asks_for_nothing(make: Callable[[Path], None], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    make(run.stop_file)
    assert requested_stop(run) is None


def test_a_request_that_finds_its_place_taken_by_a_folder_says_so(tmp_path: Path) -> None:
    """Then `wait_for` passes the signal itself on."""
    run = RunDirectory(tmp_path)
    run.stop_file.mkdir()
    with pytest.raises(IsADirectoryError):
        request_stop(run, "user")
    clear_requests(run)
    with pytest.raises(FileNotFoundError):
        request_stop(RunDirectory(tmp_path / "gone"), "user")


def test_a_stop_that_is_not_ours_to_read_is_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(Path())
    monkeypatch.chdir(tmp_path)
    run.stop_file.write_text("time")
    run.stop_file.chmod(0)
    with as_nobody():
        assert requested_stop(run) == "user"


def test_a_disk_that_is_out_of_reach_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "is_file", stale)
    assert requested_stop(RunDirectory(tmp_path)) is None


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to], ids=["link", "second name"])
def test_a_file_that_lies_in_the_place_of_a_lock_keeps_its_content(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("dear to us")
    make(tmp_path / ".lock", victim)
    for attempt in (lambda: hold_lock(tmp_path).__enter__(), lambda: lock_holder(tmp_path)):
        with pytest.raises(ConfigError, match=r"\.lock: is no lock of samestep"):
            attempt()
    assert victim.read_text() == "dear to us"


def test_a_lock_that_a_fault_has_filled_with_anything_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(bytes(range(256)) * 4)
    assert lock_holder(tmp_path) is None
    with hold_lock(tmp_path):
        assert "process" in (lock_holder(tmp_path) or "")
    assert lock_holder(tmp_path) is None


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_plain_file_is_no_lock(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / ".lock")
    for attempt in (lambda: hold_lock(tmp_path).__enter__(), lambda: lock_holder(tmp_path)):
        with pytest.raises(ConfigError, match=r"\.lock: is no lock of samestep"):
            attempt()


def test_a_link_without_an_end_makes_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(ConfigError, match="is no lock of samestep"):
        hold_lock(tmp_path).__enter__()
    assert not (tmp_path / "made").exists()


def test_a_lock_keeps_its_holder_until_another_has_it(tmp_path: Path) -> None:
    with hold_lock(tmp_path):
        held = (tmp_path / ".lock").read_text()
        with pytest.raises(ConfigError, match="under way"):
            hold_lock(tmp_path).__enter__()
        assert (tmp_path / ".lock").read_text() == held
    for rest in (b"", b"\0" * 30):
        (tmp_path / ".lock").write_bytes(rest)
        with hold_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == held
    (tmp_path / ".lock").write_text("process 12 on a\x1b[2Jhost")
    taken = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(taken, fcntl.LOCK_EX)
    assert lock_holder(tmp_path) == "process 12 on a\\x1b[2Jhost"
    os.close(taken)


def test_a_held_run_names_its_holder_to_the_second(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    refuse_if_running(run)
    with hold_lock(tmp_path):
        assert lock_holder(tmp_path, ".lock") is not None
        for attempt in (lambda: refuse_if_running(run), lambda: hold_lock(tmp_path).__enter__()):
            with pytest.raises(ConfigError, match=rf"under way \(process {os.getpid()} on "):
                attempt()
    refuse_if_running(run)
    with hold_lock(tmp_path):
        pass


def test_a_killed_process_lets_go_at_once_although_its_forked_worker_lives(tmp_path: Path) -> None:
    program = HOLD + (
        "import os, time\n"
        "with hold_lock(Path(sys.argv[1])):\n"
        "    worker = os.fork()\n"
        "    if worker: print(worker, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        assert lock_holder(tmp_path) is not None
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives
        with hold_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_looking_at_the_lock_never_keeps_a_trainer_from_taking_it(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as lock_holder does, for longer
    threading.Timer(0.3, os.close, [looking]).start()
    with hold_lock(tmp_path):
        pass


def test_a_damaged_marker_does_not_keep_the_same_command_from_going_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (run.path / "REFUSED").write_bytes(b"\xff\x00\x9b")
    assert not is_done_at(run, 8)
    clear_markers(run)
    assert read_marker(run) is None
