"""Which micro-batches are computed twice, and what memory, speeds and forecasts make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.planning.make_plan import make_plan
from launch.planning.memory import memory_of, trained_parameters
from launch.planning.memory_load import Kernels, Packed, Settings, load_of
from launch.planning.plan import Plan
from launch.planning.rechecks import COST, is_drawn, rechecked_share
from launch.planning.speeds import work_by_step, work_per_second
from launch.planning.topology import Topology
from launch.recipe.schema import Recipe
from tests.helpers.indexes import SHAPE, embedded_recipe, make_index

INDEX = make_index(330)


def planned(share: float) -> tuple[Recipe, Plan]:
    recipe = embedded_recipe(
        "training.num_train_epochs=1", f"training.recheck={share}", "batch.micro_batch_tokens=500"
    )
    plan = make_plan(recipe, INDEX, Topology("ddp", 1, 2, "cpu"))
    assert plan.micro_batches > 1
    return recipe, plan


def test_the_share_of_micro_batches_is_drawn_by_seed_step_and_number_alone() -> None:
    drawn = [(step, number) for step in range(5000) for number in range(4) if is_drawn(42, step, number, 0.1)]
    assert abs(len(drawn) / 20000 - 0.1) < 0.01
    assert drawn[:4] == [each for each in drawn[:4] if is_drawn(42, *each, 0.1)]
    assert drawn != [(step, n) for step in range(5000) for n in range(4) if is_drawn(43, step, n, 0.1)]
    assert is_drawn(42, 0, 0, 1.0)
    assert set(drawn) <= {(step, n) for step in range(5000) for n in range(4) if is_drawn(42, step, n, 0.2)}


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_is_computed_twice_counts_as_work_of_its_step_so_that_a_speed_stays_the_same(
    share: float,
) -> None:
    recipe, plan = planned(share)
    plain = work_by_step(planned(0.0)[0], INDEX, plan, range(1, plan.max_steps + 1))
    work = work_by_step(recipe, INDEX, plan, range(1, plan.max_steps + 1))
    for step in plain:
        drawn = [is_drawn(42, step - 1, number, share) for number in range(plan.micro_batches)]
        assert work[step] == pytest.approx(plain[step] * (1 + COST * sum(drawn) / plan.micro_batches))
    assert sum(work.values()) > sum(plain.values())
    assert work_per_second(
        recipe, INDEX, plan, {step: each / 250 for step, each in work.items()}
    ) == pytest.approx(250)
    assert rechecked_share(planned(0.0)[0], plan, 3) == 0


def test_memory_for_the_second_gradients_is_planned() -> None:
    size, settings = Packed(7000, 5950, 40, 7000), Settings(False, 1)
    load = load_of(planned(0.001)[0], SHAPE, "single", 1, Kernels())
    assert load.rechecked
    plain = memory_of(replace(load, rechecked=False), size, settings)
    assert memory_of(load, size, settings).trained - plain.trained == 4 * trained_parameters(load)
