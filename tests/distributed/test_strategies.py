"""Every strategy takes the steps of one process, and a run may change its strategy on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.distributed.drive import FIXED, SILENT, TRIED
from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    apart,
    assert_came_down,
    assert_the_same_to_the_byte,
    evaluations_of,
    metrics_of,
    run_of,
    sha256_of,
    write_recipe,
    write_tried_recipe,
)

KINDS = {"plain": 1e-6, "nf4": 1e-5}
"""Base -> the tolerance that is promised."""
CHAIN = (("zero3", 2, 2), ("fsdp", 2, 4), ("zero2", 2, 6), ("single", 1, None))
"""(strategy, processes, the step to stop at) of the run that changes its strategy."""


ANSWERS = {"answers": 7, "answers_every": 2, "batch_size": 3, "max_new_tokens": 5}
"""Three batches, of which two ranks have unequal shares; every second evaluation and the last."""


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>-<strategy>` of each kind and strategy, and `chain`; one launch a strategy of several processes."""
    folder = tmp_path_factory.mktemp("strategies")
    recipes = {
        kind: write_recipe(world, folder / f"{kind}.yaml", kind, checkpoint={"keep": 9}, evaluation=ANSWERS)
        for kind in KINDS
    }
    recipes["unasked"] = write_recipe(world, folder / "unasked.yaml", "plain", checkpoint={"keep": 9})
    # With a warm-up the first step would leave the weights as they are.
    recipes[SILENT] = write_recipe(
        world, folder / "silent.yaml", "plain", training={"warmup_steps": 0}, checkpoint={"every_steps": 100}
    )

    recipes[TRIED] = write_tried_recipe(world, folder / "tried.yaml", "float32")

    def request(kind: str, name: str, stop: int | None = None) -> tuple[list[str], int | None]:
        return [str(recipes[kind]), "--runs-dir", str(folder), "--name", name], stop

    for strategy, processes, stop in CHAIN:
        requests = [request(kind, f"{kind}-{strategy}") for kind in KINDS]
        if processes > 1:
            requests += [request(TRIED, f"{name}-{strategy}") for name in (TRIED, FIXED)]
        last = [request(SILENT, SILENT)] if strategy == "zero2" else []
        last += [request("unasked", f"unasked-{strategy}")] if strategy in ("zero3", "single") else []
        requests += [request("nf4", "chain", stop), *last]
        if strategy == "single":
            drive_here(requests)
        else:
            drive(processes, requests, folder, strategy=strategy)
    return folder


@pytest.mark.parametrize("strategy", ["single", "fsdp", "zero2", "zero3"])
def test_answers_are_scored_while_it_trains_and_change_nothing(runs: Path, strategy: str) -> None:
    lines = evaluations_of(runs / f"plain-{strategy}")
    asked = [line for line in lines if "answers" in line]
    assert [line["step"] for line in asked] == [4, 8]
    assert [line["answers"] for line in asked] == [7, 7]
    straight = [line for line in evaluations_of(runs / "plain-single") if "answers" in line]
    for line, expected in zip(asked, straight, strict=True):
        for key in ("accuracy", "correct", "answers_digest"):
            assert line[key] == expected[key]
    if strategy in ("single", "zero3"):
        unasked = runs / f"unasked-{strategy}"
        assert sha256_of(unasked) == sha256_of(runs / f"plain-{strategy}")
        assert not any("answers" in line for line in evaluations_of(unasked))


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize(("kind", "tolerance"), KINDS.items())
def test_a_strategy_takes_the_steps_of_one_process(
    runs: Path, strategy: str, kind: str, tolerance: float
) -> None:
    plan = run_of(runs / f"{kind}-{strategy}").plan
    assert (plan.strategy, plan.world_size) == (strategy, 2)
    loss, weights = apart(runs / f"{kind}-{strategy}", runs / f"{kind}-single")
    print(f"{kind}, {strategy}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= tolerance
    assert weights <= tolerance
    norms = [line["grad_norm"] for line in metrics_of(runs / f"{kind}-{strategy}")]
    expected = [line["grad_norm"] for line in metrics_of(runs / f"{kind}-single")]
    assert norms == pytest.approx(expected, rel=1e-5)
    evaluations, straight = (evaluations_of(runs / f"{kind}-{other}") for other in (strategy, "single"))
    for key in ("step", "samples"):
        assert [line[key] for line in evaluations] == [line[key] for line in straight]
    losses = [line["loss"] for line in evaluations]
    assert losses == pytest.approx([line["loss"] for line in straight], rel=tolerance)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_settings_come_down_in_a_trial_that_leaves_no_trace(runs: Path, strategy: str) -> None:
    tried, fixed = (runs / f"{name}-{strategy}" for name in (TRIED, FIXED))
    assert_came_down(tried, fixed)
    assert_the_same_to_the_byte(tried, fixed)


def test_an_adapter_without_gradients_is_noticed_before_deepspeed_takes_its_step(runs: Path) -> None:
    told = json.loads((runs / f"{SILENT}.json").read_text())
    assert "1 of 8 adapters got a gradient of zero in the first step, such as " in told["words"]
    assert told["agreed"]
    assert not told["trained"]


def test_a_run_that_changes_its_strategy_is_the_straight_run(runs: Path) -> None:
    loss, weights = apart(runs / "chain", runs / "nf4-single")
    print(f"zero3 -> fsdp -> zero2 -> single: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6
    strategies = {step: run_of(runs / "chain").facts(step)["strategy"] for step in (2, 4, 6, 8)}
    assert strategies == {2: "zero3", 4: "fsdp", 6: "zero2", 8: "single"}
