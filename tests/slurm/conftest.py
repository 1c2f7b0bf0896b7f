"""A real Slurm cluster of four nodes for the tests of this folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, child_environment
from tests.slurm.cluster import Cluster, missing, start


@pytest.fixture(scope="session")
def embedded() -> None:
    """The embedded charts and the tiny base, in the user's cache: minutes when they are not there yet."""
    if lacking := missing():
        pytest.fail(f"missing for a Slurm cluster: {', '.join(lacking)}; see `make test-slurm`")
    command = [sys.executable, "-m", "launch.cli", "prepare", "embedded"]
    subprocess.run(command, check=True, env=child_environment(), cwd=ROOT)


@pytest.fixture(scope="session")
def cluster(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes on loopback addresses."""
    folder: Path = tmp_path_factory.mktemp("cluster")
    found = start(folder / "slurm", folder / "runs", 4)
    yield found
    found.control("stop")
