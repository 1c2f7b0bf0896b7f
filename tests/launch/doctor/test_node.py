"""What is found about one machine without torch."""

from __future__ import annotations

import resource
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from launch.doctor import node
from launch.doctor.finding import Finding, verdict
from launch.doctor.node import Nominal, check_node, gpu_finding, nominal
from tests.helpers.indexes import embedded_recipe

HEALTHY = {
    **{"index": "0", "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1", "memory.used": "4"},
    **{"memory.total": "81559", "temperature.gpu": "40", "ecc.errors.uncorrected.volatile.total": "0"},
    **{"clocks_throttle_reasons.hw_slowdown": "Not Active", "mig.mode.current": "Disabled"},
    "clocks_throttle_reasons.hw_thermal_slowdown": "Not Active",
}


def by_check(folder: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_node(folder)}


def test_a_machine_that_can_run_is_ready_and_nothing_is_left(tmp_path: Path) -> None:
    findings = by_check(tmp_path / "runs")
    assert {"libraries", "shared memory", "limits", "runs folder", "locks"} <= findings.keys()
    assert findings["libraries"].state == findings["locks"].state == "ok"
    assert "MB/s" in findings["runs folder"].text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, "ok", "40 C"),
        ({"ecc.errors.uncorrected.volatile.total": "3"}, "failed", "3 uncorrected memory errors"),
        ({"ecc.errors.uncorrected.volatile.total": "[N/A]"}, "ok", "driver 580.1"),
        ({"clocks_throttle_reasons.hw_thermal_slowdown": "Active"}, "failed", "held down by the hardware"),
        ({"temperature.gpu": "90"}, "warning", "hot"),
        ({"memory.used": "20000"}, "warning", "another process uses it"),
    ],
)
def test_a_gpu_is_judged_by_what_its_driver_says(change: dict[str, str], state: str, words: str) -> None:
    finding = gpu_finding(HEALTHY | change)
    assert (finding.state, words in finding.text) == (state, True)
    assert bool(finding.remedy) == (state != "ok")


def test_little_memory_few_files_and_a_folder_that_cannot_be_written_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(node.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    monkeypatch.setattr(node.resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    file = tmp_path / "file"
    file.touch()
    findings = by_check(file)
    assert findings["shared memory"].state == findings["limits"].state == "warning"
    assert "ulimit -n" in findings["limits"].remedy
    assert findings["runs folder"].state == "failed"
    assert by_check(tmp_path)["runs folder"].state == "failed"  # no space


def test_a_package_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        node, "requires", lambda _: ["numpy<1", "no-such-package", "rich>=1", "x; extra == 'dev'"]
    )
    finding = by_check(tmp_path)["libraries"]
    assert finding.state == "failed"
    assert "numpy" in finding.text
    assert "no-such-package is missing" in finding.text
    assert "rich" not in finding.text


def test_a_checkout_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(node, "requires", missing)
    assert by_check(tmp_path)["libraries"].state == "warning"


def test_a_recipe_whose_base_and_data_are_not_here_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    findings = {each.check: each for each in check_node(tmp_path, embedded_recipe())}
    assert findings["base model"].state == findings["data"].state == "failed"
    assert findings["data"].remedy.startswith("samestep prepare")
    assert verdict(findings.values()).startswith("not ready: 2 failed")


def test_cards_are_known_by_their_kind() -> None:
    assert nominal("NVIDIA H100 PCIe") == Nominal(756, 2039)
    assert nominal("NVIDIA H100 80GB HBM3") == Nominal(989, 3352)
    assert nominal("NVIDIA H200") == Nominal(989, 4800)
    assert nominal("NVIDIA A100-SXM4-40GB") == Nominal(312, 1555)
    assert nominal("NVIDIA A100-SXM4-80GB") == Nominal(312, 1935)
    assert nominal("NVIDIA A10G") == Nominal(70, 600)
    assert nominal("Some other card") is None
    assert nominal("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert nominal("NVIDIA GeForce RTX 4090 Laptop GPU") is None
