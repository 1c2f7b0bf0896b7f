"""Announced stops, of real launches: at most the step under way is lost, and the run goes on to the same bytes."""

from __future__ import annotations

import os
import pty
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.launching import ROOT, family, kill_all, launch_command
from launch.run.directory import RunDirectory, read_marker
from tests.helpers.distributed.launching import (
    drive,
    interrupt,
    launcher_of,
    published_steps,
    started,
    wait_until,
    workers,
)
from tests.helpers.distributed.recorded import assert_the_same_to_the_byte, metrics_of, write_recipe

STEPS = 40
OF_ANOTHER_JOB = {
    **{"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"},
    **{"ACCELERATE_USE_FSDP": "true", "PET_NNODES": "2", "TORCHELASTIC_RUN_ID": "7"},
}


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of many steps and its straight run on two processes; checkpoints are rare."""
    folder = tmp_path_factory.mktemp("stops")
    changes = {
        "training": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 1000},
        "evaluation": {"every_steps": 10},
    }
    recipe = write_recipe(world, folder / "recipe.yaml", "plain", **changes)
    drive(2, [([str(recipe), "--runs-dir", str(folder), "--name", "straight"], None)], folder)
    return folder


def _samestep(place: Path) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "run",
        str(place / "recipe.yaml"),
        "--gpus-per-node",
        "2",
    ]
    return [*command, "--runs-dir", str(place), "--name", "stopped"]


def _plain(place: Path) -> list[str]:
    arguments = [str(place / "recipe.yaml"), "--runs-dir", str(place), "--name", "stopped"]
    return launch_command(2, ["trainer.train", *arguments])


def _until_it_steps(run: RunDirectory) -> None:
    """Until this attempt has taken a step of its own."""
    newest = max(published_steps(run.path), default=0)
    wait_until(lambda: run.metrics_file.exists() and len(metrics_of(run.path)) > newest, pause=0.01)


def _assert_stopped(run: RunDirectory, reason: str, before: int) -> int:
    """The marker says why, nothing that was trained is lost, no request is left; returns the step."""
    marker = read_marker(run)
    assert marker is not None
    step = max(published_steps(run.path))
    assert (marker.kind, marker.text) == ("STOPPED", f"{reason}: at step {step} of {STEPS}")
    assert step == metrics_of(run.path)[-1]["step"] > before
    assert not run.stop_file.exists()
    return step


@contextmanager
def _in_a_terminal(command: list[str]) -> Iterator[tuple[int, int]]:
    """A command in a terminal of its own: (process id, the terminal's other end)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TERM="xterm")
        os.chdir(ROOT)
        os.execv(command[0], command)
    try:
        yield pid, terminal
    finally:
        kill_all(family(pid))


def _listening_addresses(processes: list[psutil.Process]) -> set[str]:
    found = [connection for member in processes for connection in member.net_connections("inet")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def test_every_announced_stop_loses_nothing_and_the_run_ends_as_if_none_had_been(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log, plain_log = RunDirectory(place / "stopped"), place / "log", place / "plain.log"

    for name, value in OF_ANOTHER_JOB.items():
        monkeypatch.setenv(name, value)
    with started(_samestep(place), log) as process:  # Ctrl-C
        _until_it_steps(run)
        monkeypatch.undo()
        assert _listening_addresses(family(process.pid)) == {"127.0.0.1"}
        interrupt(process)
        assert process.wait(timeout=60) == 0
    step = _assert_stopped(run, "user", 0)
    assert "stopping at the next step boundary; Ctrl-C again ends at once" in log.read_text()
    assert (
        "environment: not passed on: ACCELERATE_USE_FSDP, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
        in log.read_text()
    )
    assert f"stopped (user: at step {step} of {STEPS})" in log.read_text()

    with started(_plain(place), plain_log) as process:  # TERM to a plain launcher, which passes it on
        _until_it_steps(run)
        process.terminate()
        process.wait(timeout=60)
        wait_until(lambda: read_marker(run) is not None)
    step = _assert_stopped(run, "terminated", step)

    with _in_a_terminal(_samestep(place)) as (pid, terminal):  # somebody closes the window
        _until_it_steps(run)
        os.close(terminal)
        ended, alive = psutil.wait_procs(family(pid), timeout=60)
        assert not alive
        assert [member.returncode for member in ended if member.pid == pid] == [0]
    step = _assert_stopped(run, "user", step)

    with started(_plain(place), plain_log) as process:  # the launcher dies: its workers stop by themselves
        _until_it_steps(run)
        left = family(process.pid)
        process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=60)
        assert not alive
    step = _assert_stopped(run, "orphaned", step)

    with started(_samestep(place), log) as process:  # a second Ctrl-C, while one rank hangs
        _until_it_steps(run)
        left = family(process.pid)
        workers(launcher_of(process.pid))[1].suspend()
        interrupt(process)
        wait_until(run.stop_file.exists)
        interrupt(process)
        assert process.wait(timeout=15) == 130
        _, alive = psutil.wait_procs(left, timeout=15)
        assert not alive
    assert read_marker(run) is None

    with started(_samestep(place), log) as process:
        assert process.wait(timeout=240) == 0
    assert "Traceback" not in log.read_text()
    assert_the_same_to_the_byte(run.path, place / "straight")
