"""What is measured in processes, and what their figures mean."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.doctor import probe
from launch.doctor.probe import Across, Measured, figures_in, judge, measure
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
    judged = judge(Measured(measured, [words] * len(measured), late, 50))
    return {finding.check: finding.state for finding in judged}


def test_a_slow_card_and_one_that_is_slower_than_its_neighbours_are_told_apart() -> None:
    assert set(states(figures(0), figures(1)).values()) == {"ok"}
    assert states(figures(0, tflops=300.0), figures(1))["products 0"] == "failed"
    assert states(figures(0, tflops=600.0), figures(1), figures(2))["products 0"] == "warning"
    assert states(figures(0, gpu=None, tflops=0.1))["products 0"] == "ok"
    assert states(figures(0, copy_gb_s=900.0), figures(1))["products 0"] == "failed"
    slow = next(judge(Measured([figures(0, copy_gb_s=900.0)], [""], (), 50)))
    assert "(76% and 27% of the data sheet)" in slow.text
    assert slow.remedy.startswith("the card's memory is slower than its kind")
    assert states(figures(0, gpu="Some other card", copy_gb_s=900.0))["products 0"] == "ok"


def test_a_process_that_fails_or_hangs_is_named_with_its_last_words() -> None:
    found = list(judge(Measured([figures(0), None], ["", "a\nNCCL error: eth9\n"], (1,), 50)))
    failed = next(finding for finding in found if finding.state == "failed")
    assert failed.check == "process 1"
    assert "did not end within 50 s (NCCL error: eth9)" in failed.text
    assert "NCCL_DEBUG=INFO" in failed.remedy
    assert "all-reduce" not in {finding.check for finding in found}
    assert states(None) == {"process 0": "failed"}


def test_an_all_reduce_that_hangs_is_told_from_products_that_do() -> None:
    stuck = {"rank": 0, "tflops": 750.0, "copy_gb_s": 3000.0, "gpu": "NVIDIA H100 80GB"}
    measured = Measured([stuck, stuck], ['{"tflops": 1}\nsocket closed'] * 2, (0, 1), 30)
    found = {each.check: each for each in judge(measured)}
    assert (found["products 0"].state, found["all-reduce"].state) == ("ok", "failed")
    assert "did not end within 30 s (socket closed)" in found["all-reduce"].text
    found = {each.check: each for each in judge(replace(measured, without_p2p=True))}
    assert "it does with NCCL_P2P_DISABLE=1" in found["all-reduce"].text
    found = {each.check: each for each in judge(Measured([figures(0)], [""], (0,), 30, across=True))}
    assert found["all-reduce of all nodes"].state == "failed"
    assert "all-reduce" not in found  # of one process


def test_a_card_is_compared_with_those_of_all_nodes() -> None:
    (finding,) = judge(Measured([figures(0, tflops=600.0)], [""], (), 30), [600.0, 760.0, 770.0])
    assert (finding.state, "slower than the others (760)" in finding.remedy) == ("warning", True)


def test_a_hanging_all_reduce_is_tried_again_without_copies_between_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stuck = {"rank": 0, "tflops": 750.0, "copy_gb_s": 3000.0}
    tried: list[tuple[dict[str, str], float]] = []

    def stand_in(
        processes: int, environment: dict[str, str], deadline: float, across: Across | None
    ) -> Measured:
        tried.append((environment, deadline))
        whole = {**stuck, "all_reduce_gb_s": 1.0} if "NCCL_P2P_DISABLE" in environment else stuck
        return Measured([whole] * processes, [""] * processes, (), deadline)

    monkeypatch.setattr(probe, "_measure", stand_in)
    assert not measure(2, {"A": "b"}).without_p2p  # no GPUs
    assert tried == [({"A": "b"}, 50.0)]
    monkeypatch.setattr(probe, "gpus_present", lambda: 2)
    assert measure(2, {"A": "b"}, across=Across("n1", 1, 0, 4)).without_p2p
    assert tried[1:] == [({"A": "b"}, 28.0), ({"A": "b", "NCCL_P2P_DISABLE": "1"}, 22.0)]


def test_figures_are_found_below_what_libraries_print() -> None:
    assert figures_in('warning\n{"tflops": 1}\n[W] later\n') == {"tflops": 1}
    assert figures_in("{not json\n") is None
    assert figures_in("") is None


def test_a_process_that_hangs_is_ended_by_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(60)")
    began = time.monotonic()
    (finding,) = judge(measure(1, {"PYTHONPATH": str(tmp_path)}, deadline=1))
    assert "did not end within 1 s" in finding.text
    assert time.monotonic() - began < 10


def test_the_command_measures_two_processes_and_their_all_reduce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "another.job")  # of another launcher: must not be followed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer.py").write_text("raise SystemExit(9)")  # of somebody else: must not be imported
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
