"""samestep doctor on the nodes of a real Slurm: whatever is wrong with one of them is named."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import attempts
from launch.slurm.output import expand_nodes
from tests.slurm.cluster import Cluster, start

pytestmark = pytest.mark.slurm

# The clock has no namespace of its own: Python itself is told another time on one node, before the doctor begins.
WRONG_CLOCK = "import time\n_time = time.time\ntime.time = lambda: _time() + 300\n"


@pytest.fixture(scope="module")
def wired(embedded: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes with cables of their own, two each."""
    folder: Path = tmp_path_factory.mktemp("wired")
    found = start(folder / "slurm", folder / "runs", 4, "netns")
    yield found
    found.control("stop")


def _python(folder: Path, on_node: str, what: str) -> str:
    """A Python that does something first on one node."""
    file = folder / "python"
    file.write_text(f'#!/bin/bash\n[ "$(hostname)" != {on_node} ] || {what}\nexec {sys.executable} "$@"\n')
    file.chmod(0o755)
    return str(file)


def _doctor(cluster: Cluster, *words: str, **site: Any) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """(exit status, what was found by node and check)."""
    file = cluster.runs / "doctor.site.yaml"
    file.write_text(json.dumps({"device": "cpu", "cpus_per_process": 1, **site}))
    place = ["--runs-dir", str(cluster.runs), "--site", str(file), "--json"]
    done = cluster.samestep("doctor", *words, *place)
    assert done.stdout.startswith("["), done.stdout + done.stderr
    findings = {(each["node"], each["check"]): each for each in json.loads(done.stdout)}
    assert not list(cluster.runs.glob(".doctor*"))
    return done.returncode, findings


def _failures(findings: dict[tuple[str, str], dict[str, str]]) -> set[tuple[str, str]]:
    assert all(each["remedy"] for each in findings.values() if each["state"] in ("failed", "warning"))
    return {key for key, each in findings.items() if each["state"] == "failed"}


def test_every_fault_of_a_node_is_named(wired: Cluster, tmp_path: Path) -> None:
    """A wrong clock on n1, another package on n2, a blocked interface and a full disk on n3, no shared disk on n4."""
    scratch, clock, metadata = tmp_path / "scratch", tmp_path / "clock", tmp_path / "METADATA"
    scratch.mkdir()
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(WRONG_CLOCK)
    installed = distribution("peft").locate_file(f"peft-{distribution('peft').version}.dist-info/METADATA")
    metadata.write_text(
        Path(str(installed))
        .read_text()
        .replace(f"\nVersion: {distribution('peft').version}", "\nVersion: 0.20.9")
    )
    wired.control("node", "2", "mount", "--bind", str(metadata), str(installed))
    wired.control("node", "3", "mount", "-t", "tmpfs", "-o", "size=1m", "full", str(scratch))
    wired.control("block", "3")
    wired.control("node", "4", "mount", "-t", "tmpfs", "other", str(wired.runs))
    python = _python(tmp_path, "n1", f"export PYTHONPATH={clock}")
    began = time.monotonic()
    status, found = _doctor(
        wired,
        "embedded",
        "--nodes",
        "4",
        "--quick",
        python=python,
        scratch=str(scratch),
        network_interface="data0",
    )
    assert time.monotonic() - began < 60
    wanted = {
        ("n1", "clock"),
        ("n2", "same versions"),
        ("n2", "libraries"),
        ("n3", "network"),
        ("n3", "scratch"),
    }
    assert (status, _failures(found)) == (1, wanted | {("n4", "shared disk")}), found
    assert found["n1", "clock"]["text"].endswith("s ahead")
    assert abs(float(found["n1", "clock"]["text"].split()[0]) - 300) < 5
    assert (
        f"peft 0.20.9, and {distribution('peft').version} on the others"
        in found["n2", "same versions"]["text"]
    )
    assert found["n3", "network"]["text"] == "no connection over data0 with n1, n2, n4"
    assert " MiB free" in found["n3", "scratch"]["text"]
    assert found["n4", "shared disk"]["text"] == f"{wired.runs}: not there"
    assert found["n2", "shared locks"]["state"] == found["n1", "data"]["state"] == "ok"


def test_a_node_whose_python_does_not_start_is_named_and_blames_nobody_else(
    cluster: Cluster, tmp_path: Path
) -> None:
    python = _python(tmp_path, "n1", "{ echo no python on this disk >&2; exit 127; }")
    status, found = _doctor(cluster, "--nodes", "2", "--quick", python=python)
    assert (status, _failures(found)) == (1, {("n1", "answer")}), found
    assert found["n1", "answer"]["text"].startswith("did not answer (")
    assert found["n2", "meeting"]["state"] == "not checked"


@pytest.mark.long
def test_nodes_that_are_fit_measure_together_and_a_job_leaves_out_one_that_is_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The first attempt has n1 and n2, whose clock is wrong; the next one has others, trains, and is done."""
    status, found = _doctor(cluster, "embedded", "--nodes", "2")
    assert (status, _failures(found)) == (0, set()), found
    assert found["n1", "all-reduce of all nodes"]["state"] == found["n2", "products 0"]["state"] == "ok"
    clock = tmp_path / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(WRONG_CLOCK)
    guarded = (
        f'[[ "$*" != *on_node* ]] || export PYTHONPATH={clock}'  # its training is to have the right time
    )
    run = cluster.submit("fit", "--nodes", "2", "--doctor", python=_python(tmp_path, "n2", guarded), steps=4)
    assert cluster.until_gone(run) == "COMPLETED", cluster.words_of(run)
    first, second = attempts.read_ledger(run).attempts
    assert (first.how, first.failed_nodes, second.how) == ("node_fail", "n2", "done"), cluster.words_of(run)
    assert first.reason.startswith("doctor: n2: clock: 300")
    assert "n2" not in expand_nodes(second.nodes)
    logs = cluster.words_of(run)
    assert "doctor: not ready: 1 failed" in logs
    assert "doctor: ready" in logs
    assert not list(run.path.glob(".doctor*"))
