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
from tests.slurm.cluster import Cluster, missing, start


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
    command = [sys.executable, "-m", "launch.cli.main", "prepare", "embedded"]
    subprocess.run(command, check=True, env=child_environment(), cwd=ROOT)


@pytest.fixture(scope="session")
def cluster(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes on loopback addresses."""
    folder: Path = tmp_path_factory.mktemp("cluster")
    found = start(folder / "slurm", folder / "runs", 4)
    yield found
    found.control("stop")
