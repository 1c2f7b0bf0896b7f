"""Micro-batches of several processes on GPUs computed twice, and their steps taken again by one process.

`pytest -m gpu tests/gpu/test_replay.py`. With two GPUs or more each process has its own, over NCCL; two processes share
a single one, over gloo.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import GPU_TOLERANCES, run_of, write_recipes_of_dtypes
from tests.helpers.launcher import samestep

GPUS = min(8, torch.cuda.device_count())
PROCESSES = max(2, GPUS)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", GPU_TOLERANCES)
def test_two_computations_of_a_micro_batch_agree_and_one_gpu_takes_the_steps_of_several_processes_again(
    world: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    if GPUS >= 2:
        monkeypatch.setenv("OWN_GPUS", "1")
    recipe = write_recipes_of_dtypes(world, tmp_path, checkpoint={"every_steps": 4})[dtype]
    checked = ["--set", "training.recheck=1"]  # a difference beyond rounding ends the launch
    said = drive(
        PROCESSES,
        [([str(recipe), "--runs-dir", str(tmp_path), "--name", "several", *checked], None)],
        tmp_path,
        strategy="ddp",
    )
    (summary,) = [line for line in said.splitlines() if "] recheck: " in line]
    checks = 8 * run_of(tmp_path / "several").plan.micro_batches
    assert f"recheck: {checks} micro-batches of every rank were computed twice" in summary
    capfd.readouterr()
    command = ("replay", str(tmp_path / "several"), "--steps", "6:7", "--gpus-per-node", "1", "--json")
    status = samestep(*command)
    printed = capfd.readouterr()
    assert status == 0, printed.out[-3000:] + printed.err[-3000:]
    (result,) = json.loads(printed.out[printed.out.index("[{") :])
    assert (result["checkpoint"], result["strategy"]) == ("checkpoint-4", "single")
    assert (result["parting"], result["tolerance"]) == (None, GPU_TOLERANCES[dtype])
    with capfd.disabled():
        print(f"{dtype}: {summary.partition('] ')[2]}")
        print(f"{dtype}: ddp x {PROCESSES} again on 1: losses within {result['largest_loss_difference']:.1e}")
