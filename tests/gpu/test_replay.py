"""Steps of a run of several processes on GPUs, taken again by one: `pytest -m gpu tests/gpu/test_replay.py`.

With two GPUs or more each process has its own, over NCCL; two processes share a single one, over gloo.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import GPU_TOLERANCES, write_recipes_of_dtypes
from tests.helpers.launcher import samestep

GPUS = min(8, torch.cuda.device_count())
PROCESSES = max(2, GPUS)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", GPU_TOLERANCES)
def test_one_gpu_takes_the_steps_of_several_processes_again(
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
    drive(
        PROCESSES,
        [([str(recipe), "--runs-dir", str(tmp_path), "--name", "several"], None)],
        tmp_path,
        strategy="ddp",
    )
    capfd.readouterr()
    command = ("replay", str(tmp_path / "several"), "--steps", "6:7", "--gpus-per-node", "1", "--json")
    status = samestep(*command)
    printed = capfd.readouterr()
    assert status == 0, printed.out[-3000:] + printed.err[-3000:]
    (result,) = json.loads(printed.out[printed.out.index("[{") :])
    assert (result["checkpoint"], result["strategy"]) == ("checkpoint-4", "single")
    assert (result["parting"], result["tolerance"]) == (None, GPU_TOLERANCES[dtype])
    with capfd.disabled():
        print(f"{dtype}: ddp x {PROCESSES} again on 1: losses within {result['largest_loss_difference']:.1e}")
