"""What is measured in processes, and what their figures mean."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launch.doctor.probe import figures_in, judge, probe
from tests.helpers.launcher import samestep


def figures(rank: int, **changes: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "tflops": 750.0,
        "copy_gb_s": 3000.0,
        "gpu": "NVIDIA H100 80GB",
        "all_reduce_gb_s": 90.0,
    } | changes


def states(
    *measured: dict[str, Any] | None, words: str = "boom", late: tuple[int, ...] = ()
) -> dict[str, str]:
    judged = judge(len(measured), measured, [words] * len(measured), late, 50)
    return {finding.check: finding.state for finding in judged}


def test_a_slow_card_and_one_that_is_slower_than_its_neighbours_are_told_apart() -> None:
    assert set(states(figures(0), figures(1)).values()) == {"ok"}
    assert states(figures(0, tflops=300.0), figures(1))["products 0"] == "failed"
    assert states(figures(0, tflops=600.0), figures(1), figures(2))["products 0"] == "warning"
    assert states(figures(0, gpu=None, tflops=0.1))["products 0"] == "ok"


def test_a_process_that_fails_or_hangs_is_named_with_its_last_words() -> None:
    found = list(judge(2, [figures(0), None], ["", "a\nNCCL error: eth9\n"], (1,), 50))
    failed = next(finding for finding in found if finding.state == "failed")
    assert failed.check == "process 1"
    assert "did not end within 50 s (NCCL error: eth9)" in failed.text
    assert "NCCL_DEBUG=INFO" in failed.remedy
    assert "all-reduce" not in {finding.check for finding in found}
    assert states(None) == {"process 0": "failed"}


def test_figures_are_found_below_what_libraries_print() -> None:
    assert figures_in('warning\n{"tflops": 1}\n[W] later\n') == {"tflops": 1}
    assert figures_in("{not json\n") is None
    assert figures_in("") is None


def test_a_process_that_hangs_is_ended_by_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)")
    began = time.monotonic()
    (finding,) = probe(1, {"PYTHONPATH": str(tmp_path)}, deadline=1)
    assert "did not end within 1 s" in finding.text
    assert time.monotonic() - began < 10


def test_the_command_measures_two_processes_and_their_all_reduce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "another.job")  # of another launcher: must not be followed
    assert samestep("doctor", "--gpus-per-node", "2", "--runs-dir", str(tmp_path), "--json") == 0
    findings = {each["check"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"products 0", "products 1", "all-reduce"} <= findings.keys()
    assert "2 processes" in findings["all-reduce"]["text"]
    assert "sum correct" in findings["all-reduce"]["text"]


def test_what_is_wrong_with_the_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("doctor", "no-such-recipe", "--quick") == 2
    assert "no-such-recipe" in capsys.readouterr().err
    assert samestep("doctor", "--quick", "--gpus-per-node", "0") == 2
    (tmp_path / "file").touch()
    assert samestep("doctor", "--quick", "--runs-dir", str(tmp_path / "file")) == 1
    assert "not ready: 1 failed" in capsys.readouterr().out.replace("2 failed", "1 failed")
