"""The run directory: names, markers, and one writer at a time."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.run_directory import (
    RunDirectory,
    clear_markers,
    hold_lock,
    lock_holder,
    open_run,
    read_marker,
    refuse_if_running,
    write_marker,
)

HOLD = "import sys; from pathlib import Path; from launch.run_directory import hold_lock\n"


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
