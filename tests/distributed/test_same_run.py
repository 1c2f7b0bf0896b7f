"""The promises about sameness, with dropout: world sizes 1 to 4 (several processes by real launches), micro-batch
budgets, recomputation, and one run that moves from 1 to 2 to 4 to 3 to 1 processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.run.directory import read_marker
from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    adapter_of,
    apart,
    evaluations_of,
    metrics_of,
    run_of,
    write_recipe,
)
from trainer.loop.step_record import VARIABLE

WORLD_SIZES = (1, 2, 3, 4)
KINDS = ("plain", "nf4")
BUDGETS = {"auto": "auto", "roomy": 100_000, "tight": 200}
"""`tight` is a little more than the longest sample: many micro-batches; `roomy` packs a step into one."""
MOVES = ((1, 2), (2, 4), (4, 6), (3, 8), (1, None))
"""(processes, the step to stop at) of the run that moves."""

RECORDED = 3
"""The world size whose steps are recorded, which alters nothing."""


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs this module looks at, in one launch per world size above 1.

    `same-<kind>-<world size>`: 8 steps with dropout 0.05, `undropped-1` without. `budget-<name>-<world size>` and
    `recomputed-1`: the same, packed otherwise. `straight` and `moving`: 10 steps, the second over all world sizes.
    """
    folder = tmp_path_factory.mktemp("same")
    same = {kind: write_recipe(world, folder / f"{kind}.yaml", kind) for kind in KINDS}
    tighter = {
        name: write_recipe(world, folder / f"{name}.yaml", "plain", batch={"micro_batch_tokens": budget})
        for name, budget in BUDGETS.items()
        if name != "auto"
    }
    recomputed = write_recipe(
        world, folder / "recomputed.yaml", "plain", training={"gradient_checkpointing": True}
    )
    undropped = write_recipe(world, folder / "undropped.yaml", "plain", lora={"lora_dropout": 0.0})
    ten = write_recipe(
        world, folder / "ten.yaml", "plain", training={"max_steps": 10}, checkpoint={"keep": 9}
    )

    def request(recipe: Path, name: str, stop: int | None = None) -> tuple[list[str], int | None]:
        return [str(recipe), "--runs-dir", str(folder), "--name", name], stop

    for place, (size, stop) in enumerate(MOVES):
        os.environ[VARIABLE] = "1" if size == RECORDED else "0"
        requests = [request(ten, "moving", stop)]
        if place < 4:
            requests += [request(same[kind], f"same-{kind}-{size}") for kind in KINDS]
            requests += [request(tighter[name], f"budget-{name}-{size}") for name in tighter]
        if place == 0:
            requests += [request(recomputed, "recomputed-1"), request(ten, "straight")]
            requests += [request(undropped, "undropped-1")]
        if size == 1:
            drive_here(requests)
        else:
            drive(size, requests, folder)
    os.environ.pop(VARIABLE)
    return folder


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
@pytest.mark.parametrize(("kind", "tolerance"), [("plain", 1e-6), ("nf4", 1e-5)])
def test_every_world_size_takes_the_same_steps(runs: Path, kind: str, tolerance: float, size: int) -> None:
    one, several = runs / f"same-{kind}-1", runs / f"same-{kind}-{size}"
    assert len(metrics_of(one)) == 8
    for key in ("samples_digest", "target_tokens", "tokens", "samples", "learning_rate", "step"):
        assert [line[key] for line in metrics_of(several)] == [line[key] for line in metrics_of(one)]
    loss, weights = apart(several, one)
    print(f"{kind}, world size {size}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= tolerance
    assert weights <= tolerance


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("budget", [name for name in BUDGETS if name != "auto"])
def test_every_packing_takes_the_same_steps(runs: Path, budget: str, size: int) -> None:
    one, packed = runs / "same-plain-1", runs / f"budget-{budget}-{size}"
    other, expected = run_of(packed).plan, run_of(one).plan
    assert other.micro_batch_tokens != expected.micro_batch_tokens
    assert size > 1 or other.micro_batches != expected.micro_batches
    loss, weights = apart(packed, one)
    print(f"budget {budget}, world size {size}: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6


def test_every_rank_records_its_steps_and_the_log_says_who_was_waited_for(runs: Path) -> None:
    logs = runs / f"same-plain-{RECORDED}" / "logs"
    files = sorted(logs.glob("steps-of-rank-*.jsonl"))
    assert [file.name for file in files] == [f"steps-of-rank-{rank}.jsonl" for rank in range(RECORDED)]
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert [row["step"] for row in rows] == [*range(1, 9)]
        assert all(row["launching"] > 0 and row["reduction"] > 0 for row in rows)
    log = "".join(file.read_text() for file in logs.glob("*.log"))
    assert "steps 1 to 8: ranks waited" in log
    assert not list((runs / "same-plain-2" / "logs").glob("steps-of-rank-*"))


def test_recomputed_activations_give_the_same_run_to_the_bit(runs: Path) -> None:
    assert apart(runs / "recomputed-1", runs / "same-plain-1") == (0, 0)


def test_dropout_takes_part_in_what_is_compared(runs: Path) -> None:
    loss, weights = apart(runs / "undropped-1", runs / "same-plain-1")
    assert loss > 1e-5
    assert weights > 1e-5


def test_the_steps_train(runs: Path) -> None:
    moved = adapter_of(runs / "same-nf4-1")
    assert all(tensor.abs().max() > 0 for tensor in moved.values())
    losses = [line["loss"] for line in evaluations_of(runs / "same-nf4-1")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_evaluations_see_every_sample_once_and_agree(runs: Path, size: int) -> None:
    one, several = evaluations_of(runs / "same-plain-1"), evaluations_of(runs / f"same-plain-{size}")
    assert [line["step"] for line in several] == [2, 4, 6, 8]
    assert {line["samples"] for line in several} == {10}
    assert [line["loss"] for line in several] == pytest.approx([line["loss"] for line in one], rel=1e-6)


def test_a_run_that_moves_over_five_world_sizes_is_the_straight_run(runs: Path) -> None:
    straight, moving = runs / "straight", runs / "moving"
    assert [line["samples_digest"] for line in metrics_of(moving)] == [
        line["samples_digest"] for line in metrics_of(straight)
    ]
    loss, weights = apart(moving, straight)
    print(f"1 -> 2 -> 4 -> 3 -> 1: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6
    sizes = {step: run_of(moving).facts(step)["world_size"] for step in (6, 8, 10)}
    assert sizes == {6: 4, 8: 3, 10: 1}
    evaluated = evaluations_of(straight)
    assert [line["step"] for line in evaluations_of(moving)] == [line["step"] for line in evaluated]
    assert [line["loss"] for line in evaluations_of(moving)] == pytest.approx(
        [line["loss"] for line in evaluated], rel=1e-6
    )
    marker = read_marker(run_of(moving).directory)
    assert marker is not None
    assert (marker.kind, marker.text) == ("DONE", "step 10")
