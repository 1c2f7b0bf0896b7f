"""Micro-batches computed a second time by another rank: no number moves, and a rank that computes wrongly is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed.forked import forked_launch
from tests.helpers.distributed.recorded import (
    assert_the_same_to_the_byte,
    metrics_of,
    published_files,
    run_of,
    write_recipe,
)

SECONDS = 150  # of a run that ends badly, its start included, on a busy machine


def _launch(
    world: Path,
    folder: Path,
    processes: int,
    names: Sequence[str],
    strategy: str | None = None,
    dtype: str = "float32",
) -> Path:
    recipe = write_recipe(
        world,
        folder / "recipe.yaml",
        model={"dtype": dtype},
        training={"max_steps": 5},
        batch={"micro_batch_tokens": 220},
        checkpoint={"every_steps": 2},
        evaluation={"every_steps": 5, "max_samples": 6},
    )
    done = forked_launch(
        processes,
        ["tests.helpers.distributed.faulty_rank", str(recipe), str(folder), *names],
        strategy=strategy,
    )
    assert done.returncode == 0, done.stdout
    return folder


def _ended(folder: Path, name: str, processes: int) -> dict[str, Any]:
    """How a run ended badly, which all ranks know alike and soon."""
    ends = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]
    assert max(end.pop("seconds") for end in ends) < SECONDS
    assert ends == [ends[0]] * processes
    assert (ends[0]["agreed"], ends[0]["status"]) == (True, 1)
    assert not (folder / name / "adapter").exists()
    return ends[0]


def _assert_nothing_moved(folder: Path) -> None:
    assert run_of(folder / "on").plan.micro_batches > 1
    assert_the_same_to_the_byte(folder / "on", folder / "off")
    checkpoints = [published_files(folder / name) for name in ("on", "off")]
    assert checkpoints[0] == checkpoints[1]
    assert len(checkpoints[0]) >= 8


def test_a_rank_that_computes_wrongly_is_named_by_three_and_stops_all(world: Path, tmp_path: Path) -> None:
    folder = _launch(world, tmp_path, 3, ["off", "on", "weight", "once", "full"])
    _assert_nothing_moved(folder)

    words = _ended(folder, "weight", 3)["words"]
    assert words.startswith("step 3, micro-batch 1 of 2: rank 1 (host ")
    assert "computed otherwise than the ranks on both sides (loss " in words
    assert [line["step"] for line in metrics_of(folder / "weight")] == [1, 2]
    assert (folder / "weight" / "checkpoint-2" / "manifest.json").exists()

    words = _ended(folder, "once", 3)["words"]
    assert words.startswith("step 2, micro-batch 1 of 2: rank 1 (host ")
    assert "and rank 2 (host " in words
    assert "one of them is wrong" in words

    assert _ended(folder, "full", 3)["words"].startswith("rank 1: GPU: out of memory")


@pytest.mark.parametrize(
    ("strategy", "processes", "dtype", "limits"),
    [("zero3", 2, "float32", "1e-05 and 1e-04"), (None, 1, "bfloat16", "5e-03 and 5e-02")],
)
def test_shared_out_layers_and_one_process_are_checked_too(
    world: Path, tmp_path: Path, strategy: str | None, processes: int, dtype: str, limits: str
) -> None:
    """In 16 bits the fault, one of 64 channels of one layer's output, is not much beyond what may be rounding."""
    folder = _launch(world, tmp_path, processes, ["off", "on", "once"], strategy, dtype)
    _assert_nothing_moved(folder)
    words = _ended(folder, "once", processes)["words"]
    assert f"rounding explains {limits}" in words
    assert words.startswith("step 2, micro-batch 1 of ")
    assert all(f"rank {rank} (host " in words for rank in range(processes))
