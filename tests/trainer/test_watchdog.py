"""The thread with open eyes: whom it ends, when, and whom it leaves alone."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from launch.launcher_variables import MARKER_DECIDES, PARENT
from launch.run.directory import (
    Marker,
    RunDirectory,
    clear_markers,
    read_marker,
    request_stop,
    write_marker,
)
from launch.subprocesses import processes_with
from trainer import WATCHDOG, launcher, watchdog
from trainer.distributed.stop_requests import handle_early_stops, handle_stop_requests
from trainer.watchdog import (
    OTHERS_PATIENCE_S,
    PATIENCE_S,
    SAVE_PATIENCE_S,
    Watchdog,
    parent_of_this_process,
)


class EndedError(Exception):
    """Instead of the end of the test's own process."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The watchdog's time stands still unless it is moved, and its end is an exception."""

    def end(self: Watchdog, why: str) -> NoReturn:
        raise EndedError(why)

    found = Clock()
    monkeypatch.setattr(watchdog, "time", found)
    monkeypatch.setattr(Watchdog, "end", end)
    return found


def _let_pass(clock: Clock, watched: Watchdog, seconds: float) -> None:
    """With a look every second, the last at the end."""
    for _ in range(int(seconds)):
        clock.now += 1
        watched.look()


def _asked(reason: str | None) -> Callable[[bytes], str | None]:
    return lambda _: reason


def test_a_process_whose_parent_is_gone_ends_at_once_unless_it_stops_in_good_order(clock: Clock) -> None:
    Watchdog(None).look()  # nobody waits for it
    Watchdog(os.getppid()).look()
    orphan = Watchdog(0)
    with pytest.raises(EndedError, match="its launcher is gone"):
        orphan.look()
    orphan.answer_stops(_asked("orphaned"), lambda _: None)
    orphan.look()
    orphan.forget_stops()
    with pytest.raises(EndedError):
        orphan.look()
    orphan.answer_stops(_asked(None), lambda _: None, orderly=False)
    with pytest.raises(EndedError):
        orphan.look()


def test_a_stop_that_is_answered_has_all_the_time_it_needs_and_one_that_is_not_has_none(clock: Clock) -> None:
    given_up: list[str] = []
    watched = Watchdog(None)
    watched.answer_stops(_asked("user"), given_up.append)
    for _ in range(10):
        watched.look()
        _let_pass(clock, watched, PATIENCE_S - 1)
        watched.heartbeat()
    watched.look()
    assert not given_up
    with pytest.raises(EndedError, match=r"asked to stop \(user\) and without progress for 20 s"):
        _let_pass(clock, watched, PATIENCE_S)
    assert given_up == ["user"]  # no step was taken: nothing is lost


def test_slow_steps_teach_patience_and_are_not_given_up_as_if_none_had_been_taken(clock: Clock) -> None:
    given_up: list[str] = []
    watched = Watchdog(None)
    asked: list[str] = []
    watched.answer_stops(lambda _: asked[0] if asked else None, given_up.append)
    clock.now += 500  # the base was loaded: no measure for a step
    watched.steps_begin()
    for _ in range(3):
        clock.now += 70
        watched.heartbeat()
    asked.append("time")
    watched.look()
    _let_pass(clock, watched, 3 * 70 - 1)
    with pytest.raises(EndedError):
        _let_pass(clock, watched, 1)
    assert not given_up


def test_the_micro_batches_of_the_first_step_teach_patience_within_bounds(clock: Clock) -> None:
    watched = Watchdog(None)
    for slow, patience in (
        (30, 90),
        (3600, SAVE_PATIENCE_S),
    ):  # a process that was suspended for an hour, say
        watched.answer_stops(_asked("user"), lambda _: None)
        watched.micro_batch_begins()
        clock.now += slow
        watched.micro_batch_begins()
        watched.steps_begin()
        watched.look()
        _let_pass(clock, watched, patience - 1)
        with pytest.raises(EndedError):
            _let_pass(clock, watched, 1)


def test_the_time_in_which_a_process_was_suspended_is_not_held_against_it(clock: Clock) -> None:
    watched = Watchdog(None)
    watched.answer_stops(_asked("user"), lambda _: None)
    watched.look()
    clock.now += 3600
    watched.look()
    _let_pass(clock, watched, PATIENCE_S - 1)
    with pytest.raises(EndedError):
        _let_pass(clock, watched, 1)


def test_a_save_under_way_is_not_cut_off_and_not_waited_for_without_end(clock: Clock) -> None:
    watched = Watchdog(None)
    saving = [True]
    watched.answer_stops(_asked("user"), lambda _: None, lambda: saving[0])
    watched.steps_begin()
    watched.look()
    _let_pass(clock, watched, SAVE_PATIENCE_S - 1)
    with pytest.raises(EndedError):
        _let_pass(clock, watched, 1)


def test_a_signal_is_seen_while_the_main_thread_hears_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with handle_stop_requests(run, 1, None) as watch:
        os.write(WATCHDOG.wakeup, bytes([signal.SIGCHLD, signal.SIGTERM]))
        deadline = time.monotonic() + 10
        while watch._signalled is None:  # the thread looks for itself
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert watch._signalled == "terminated"


def test_what_is_given_up_before_its_first_step_has_stopped_as_asked(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    monkeypatch.setattr("trainer.distributed.stop_requests.WATCHDOG", watched := Watchdog(None))
    for rank, left in ((1, None), (0, Marker("STOPPED", "time: at step 3 of 9"))):
        request_stop(run, "time")
        with handle_stop_requests(run, rank, 0 if rank else None) as watch:  # rank 1 knows it from its parent
            watch.begins_at = "at step 3 of 9"
            watched.look()
            with pytest.raises(EndedError):
                _let_pass(clock, watched, PATIENCE_S)
        assert read_marker(run) == left
    assert not run.stop_file.exists()

    (run.path / "STOPPED").unlink()
    for rank, patience, word in (
        ("1", OTHERS_PATIENCE_S, None),  # after the first, which it would take down
        ("0", PATIENCE_S, Marker("STOPPED", "user: before it began")),
    ):
        monkeypatch.setenv("RANK", rank)
        run.stop_file.unlink(missing_ok=True)
        handle_early_stops(run)
        watched.look()
        _let_pass(clock, watched, PATIENCE_S)
        request_stop(run, "user")
        watched.look()
        _let_pass(clock, watched, patience - 1)
        with pytest.raises(EndedError):
            _let_pass(clock, watched, 1)
        assert read_marker(run) == word


def test_a_launcher_heeds_the_stops_of_those_it_trains_with_and_leaves_its_processes_alone(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a run that is evaluated, which would lose its marker."""
    run = RunDirectory(tmp_path)
    write_marker(run, "DONE", "step 9")
    request_stop(run, "user")
    monkeypatch.setattr("trainer.launcher.WATCHDOG", watched := Watchdog(None))
    monkeypatch.setattr("accelerate.commands.launch.main", lambda: None)
    monkeypatch.setenv(PARENT, "")  # `main` sets it
    arguments = ["launcher", "--num_machines", "2", "--run-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    launcher.main()
    watched.look()
    _let_pass(clock, watched, 2 * PATIENCE_S)
    assert read_marker(run) == Marker("DONE", "step 9")
    assert watched.spares_children

    clear_markers(run)
    monkeypatch.setattr(sys, "argv", [*arguments, MARKER_DECIDES])
    launcher.main()
    monkeypatch.setattr(psutil.Process, "children", lambda _: [])
    watched.look()
    with pytest.raises(EndedError):
        _let_pass(clock, watched, PATIENCE_S)
    assert read_marker(run) == Marker("STOPPED", "user: before it began")


def test_only_a_save_of_this_attempt_is_one_under_way(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "checkpoint-1.partial").mkdir()  # of an attempt that was killed
    monkeypatch.setattr("trainer.distributed.stop_requests.WATCHDOG", watched := Watchdog(None))
    with handle_stop_requests(run, 0, None):
        assert not watched._is_saving()
        (tmp_path / "checkpoint-2.partial").mkdir()
        assert watched._is_saving()


def test_a_process_knows_its_parent_by_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parent_of_this_process({}) is None
    assert parent_of_this_process({PARENT: "12"}) == 12
    launched = {"TORCHELASTIC_RUN_ID": "none"}
    assert parent_of_this_process(launched) == os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "getsid", lambda pid: pid)
    monkeypatch.setattr(Path, "samefile", lambda *_: False)
    assert parent_of_this_process(launched) == 0  # the launcher died before this process could look


def test_a_child_that_waits_for_a_lock_ends_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trainer.prepare` of a command that is killed; it also says what it waits for."""
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path))
    log, recipe = tmp_path / "log", Path(__file__).parents[2] / "recipes" / "embedded.yaml"
    program = "import sys; from launch.subprocesses import call_module as c; c(sys.argv[1], sys.argv[2:])"
    left: list[psutil.Process] = []
    with (tmp_path / "prepare.lock").open("a") as lock, log.open("w") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        parent = subprocess.Popen(
            [sys.executable, "-c", program, "trainer.prepare", str(recipe), "--set", f"name=n{os.getpid()}"],
            stderr=output,
        )
        try:
            deadline = time.monotonic() + 60
            while "waiting for another process" not in log.read_text():
                assert time.monotonic() < deadline
                assert parent.poll() is None
                time.sleep(0.05)
            left = processes_with([f"name=n{os.getpid()}"])
            parent.kill()
            _, alive = psutil.wait_procs(left, timeout=10)
            assert not alive
        finally:
            parent.kill()
            parent.wait()
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    assert "error: its launcher is gone; ended" in log.read_text()
