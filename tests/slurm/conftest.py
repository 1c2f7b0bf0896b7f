"""A real Slurm cluster of four nodes for the tests of this folder."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.launching import ROOT, child_environment
from launch.inputs.caches import base_is_there
from launch.inputs.dataset_index import read_index
from launch.recipe.loading import find_recipe, load_recipe
from tests.slurm.cluster import Cluster, missing, start, wait

# Trains until it is asked to stop, or told that it is done; without a node it leaves no word.
TRAINER = """#!/bin/bash
[ "$2" = accelerate.commands.launch ] || exec PYTHON "$@"
while :; do
  [ ! -e "$RUN/enough" ] || { echo "DONE step 8" >"$RUN/marker"; break; }
  [ ! -e "$RUN/STOP" ] || [ ! -e "$RUN/lost" ] || exit 1
  [ ! -e "$RUN/STOP" ] || { read -r why <"$RUN/STOP"; echo "STOPPED $why: at step 4 of 8" >"$RUN/marker"; break; }
  sleep 0.1
done
[ "$SLURM_NODEID" != 0 ] || PYTHON -c 'import os, pathlib
from launch.run.directory import RunDirectory, write_marker
run = RunDirectory(pathlib.Path(os.environ["RUN"]))
kind, _, text = (run.path / "marker").read_text().strip().partition(" ")
write_marker(run, kind, text)'
"""


@pytest.fixture(scope="session")
def machine() -> Iterator[None]:
    """What a cluster needs, for these tests alone: two clusters' jobs of one number share control groups and ports."""
    if lacking := missing():
        pytest.fail(f"missing for a Slurm cluster: {', '.join(lacking)}; see `make test-slurm`")
    with (Path(tempfile.gettempdir()) / "samestep-slurm-tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def embedded(machine: None) -> None:
    """The embedded charts and the tiny base, in the user's cache: minutes when they are not there yet."""
    recipe = load_recipe(find_recipe("embedded"))
    if base_is_there(recipe) and read_index(recipe) is not None:
        return
    command = [sys.executable, "-m", "launch.cli.main", "prepare", "embedded"]
    subprocess.run(command, check=True, env=child_environment(), cwd=ROOT)


@pytest.fixture(scope="session")
def cluster(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes on loopback addresses."""
    folder: Path = tmp_path_factory.mktemp("cluster")
    found = start(folder / "slurm", folder / "runs", 4)
    yield found
    found.control("stop")


@pytest.fixture(autouse=True)
def no_jobs_are_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed leaves jobs, and dead nodes: the next ones would wait for these in vain."""
    yield
    used: Cluster | None = request.node.funcargs.get("cluster")
    if used is not None:
        used.on("scancel", "--user=root")
        used.control("start", "4")
        wait(lambda: not used.on("squeue", "-h").stdout, 120, lambda: used.on("squeue").stdout)


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    file = tmp_path / "python"
    file.write_text(TRAINER.replace("PYTHON", sys.executable))
    file.chmod(0o755)
    return file
