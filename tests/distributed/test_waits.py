"""Waits that nothing would end: before the first step, and for a micro-batch that is lost. A minute is the most."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.launching import family, launch_command
from launch.run.directory import RunDirectory, read_marker
from tests.helpers.distributed.launching import launcher_of, published_steps, started, wait_until
from tests.helpers.distributed.recorded import metrics_of, write_recipe

LIMIT_S = 60
SMALL = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    """Of many steps, each a checkpoint."""
    steps = {"max_steps": 40, "dataloader_num_workers": 1}
    return write_recipe(world, tmp_path / "recipe.yaml", training=steps, checkpoint={"every_steps": 1})


def _seconds_to_end(everybody: list[psutil.Process]) -> float:
    began = time.monotonic()
    ended, alive = psutil.wait_procs(everybody, timeout=2 * LIMIT_S)
    assert not alive
    assert 0 not in [member.returncode for member in ended]
    return time.monotonic() - began


def test_a_launcher_that_is_killed_while_its_processes_import_leaves_none(recipe: Path) -> None:
    log = recipe.parent / "log"
    command = [sys.executable, "-m", "launch.cli.main", "run", str(recipe), "--gpus-per-node", "2"]
    with started([*command, "--runs-dir", str(recipe.parent), "--name", "killed"], log) as process:
        # The first child prepares the data and has none of its own.
        wait_until(lambda: len(family(process.pid)) == 4 or process.poll() is not None, pause=0.05)
        assert process.poll() is None, log.read_text()
        everybody = family(process.pid)
        psutil.Process(launcher_of(process.pid)).kill()
        took = _seconds_to_end(everybody)
    assert took < LIMIT_S
    words = log.read_text()
    assert words.count("its launcher is gone; ended") == 2
    assert f"{recipe.parent / 'killed'}: ended before it was done; see the words above" in words
    assert "Traceback" not in words


def test_a_run_in_little_shared_memory_takes_its_steps_and_a_lost_micro_batch_does_not_outlast_a_stop(
    recipe: Path,
) -> None:
    run, log = RunDirectory(recipe.parent / "small"), recipe.parent / "log"
    arguments = [
        "tests.distributed.lose_batches",
        str(recipe),
        "--runs-dir",
        str(recipe.parent),
        "--name",
        "small",
    ]
    own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*own, "sh", "-c", SMALL, "sh", *launch_command(1, arguments)]
    with started(command, log) as process:
        wait_until(lambda: max(published_steps(run.path), default=0) == 1 or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        everybody = family(process.pid)
        (trainer,) = (member for member in everybody if member.ppid() == process.pid)
        trainer.send_signal(signal.SIGTERM)
        took = _seconds_to_end(everybody)
    assert took < LIMIT_S
    words = log.read_text()
    assert words.count("/dev/shm: 2.1 MB of 2.1 MB free, micro-batches read ahead may take") == 1
    assert "they come through pipes" in words
    assert "asked to stop (terminated) and without progress for" in words
    assert [line["step"] for line in metrics_of(run.path)] == [1]  # micro-batches 0 and 1
    assert read_marker(run) is None  # it was asked, and did not get there
