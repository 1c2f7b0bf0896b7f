"""The forecast of a plan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch.planning import forecast
from launch.planning.forecast import (
    EFFICIENCY,
    SCALED,
    TABLED,
    forecast_rows,
    forecasts,
    tokens_of_steps,
)
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan
from launch.planning.rechecks import COST
from launch.planning.run_steps import stream_of
from launch.planning.speeds import (
    read_speeds,
    remember_speed,
    speed_key,
    speeds_file,
    work_by_step,
    work_of_steps,
    work_per_second,
)
from launch.planning.step_plan import StreamOffset
from launch.planning.topology import Topology
from launch.recipe.schema import Recipe
from tests.helpers.indexes import SHAPE, embedded_recipe, make_index

H100 = "NVIDIA H100 80GB HBM3"
INDEX = make_index(330)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Plan]:
    monkeypatch.setattr(
        forecast,
        "read_shape",
        lambda recipe: replace(SHAPE, hidden=3584, layers=28, vision_intermediate=5120),
    )
    recipe = embedded_recipe("training.num_train_epochs=1")
    plan = make_plan(recipe, INDEX, Topology("ddp", 1, 4, "cpu"))
    return recipe, replace(plan, device="cuda", load_in_4bit=True, compute_dtype="bfloat16")


@pytest.mark.parametrize("epochs", ["1", "1.5", "2.3"])
def test_every_token_of_the_trained_samples_is_counted_once(epochs: str) -> None:
    recipe = embedded_recipe(f"training.num_train_epochs={epochs}")
    plan = make_plan(recipe, INDEX, Topology("single", 1, 1, "cpu"))
    lengths = INDEX.splits["train"].tokens
    order = np.concatenate([stream_of(recipe, plan).samples(step) for step in range(plan.max_steps)])
    assert tokens_of_steps(recipe, INDEX, plan) == lengths[order].sum()
    assert plan.max_steps == int(330 * float(epochs)) // 32


def test_a_run_that_goes_on_is_forecast_from_where_its_plan_begins(planned: tuple[Recipe, Plan]) -> None:
    recipe, plan = planned
    later = replace(plan, begin=StreamOffset(4, 4 * 32))
    whole, rest = (forecasts(recipe, INDEX, each, H100, None, None)[0] for each in (plan, later))
    stream, lengths = stream_of(recipe, plan), INDEX.splits["train"].tokens
    assert whole.tokens - rest.tokens == sum(int(lengths[stream.samples(step)].sum()) for step in range(4))


def test_time_cost_and_energy_follow_from_the_tabled_speed_for_every_layout(
    planned: tuple[Recipe, Plan],
) -> None:
    expected = forecasts(*planned[:1], INDEX, planned[1], H100, 2.0, 500.0)
    assert (expected[0].strategy, expected[0].world_size) == ("ddp", 4)
    assert {(each.strategy, each.world_size) for each in expected} == EFFICIENCY.keys()
    own = expected[0]
    work = work_of_steps(planned[0], INDEX, planned[1], 1, planned[1].max_steps)
    speed = forecast.H100_SHARE * forecast.WORK_PER_SECOND
    assert own.hours == pytest.approx(work / (speed * 4 * EFFICIENCY["ddp", 4]) / 3600)
    assert own.gpu_hours == pytest.approx(4 * own.hours)
    assert (own.cost, own.energy_kwh) == (2 * own.gpu_hours, 0.5 * own.gpu_hours)
    assert {row[-1] for row in forecast_rows(expected)} == {SCALED}
    measured = forecasts(*planned[:1], INDEX, planned[1], "NVIDIA H200", None, None)[0]
    assert (measured.source, measured.hours) == (TABLED, pytest.approx(forecast.H100_SHARE * own.hours))


def test_a_speed_measured_with_rechecks_is_that_of_the_steps_without(planned: tuple[Recipe, Plan]) -> None:
    _, plan = planned
    some = embedded_recipe("training.num_train_epochs=1", "training.recheck=0.4")
    plain = embedded_recipe("training.num_train_epochs=1")
    usual, counted = (work_by_step(each, INDEX, plan, range(1, 11)) for each in (plain, some))
    drawn = [step for step in usual if counted[step] > usual[step]]
    assert 0 < len(drawn) < 7
    seconds = {step: usual[step] / 100 * (3.1 if step in drawn else 1) for step in usual}
    assert work_per_second(some, INDEX, plan, seconds) == pytest.approx(100)
    assert speed_key(some) == speed_key(plain)


def test_micro_batches_that_are_computed_twice_take_their_time(planned: tuple[Recipe, Plan]) -> None:
    recipe, plan = planned
    twice = embedded_recipe("training.num_train_epochs=1", "training.recheck=1")
    tabled = [forecasts(each, INDEX, plan, H100, None, None)[0] for each in (recipe, twice)]
    remember_speed(recipe, INDEX, plan, H100, dict.fromkeys(range(1, 11), 1.0))
    measured = [forecasts(each, INDEX, plan, H100, None, None)[0] for each in (recipe, twice)]
    for plain, rechecked in (tabled, measured):
        assert rechecked.source == plain.source
        assert rechecked.hours == pytest.approx((1 + COST) * plain.hours)
        assert rechecked.tokens == plain.tokens


def test_a_measured_speed_wins_and_scales_to_other_layouts(planned: tuple[Recipe, Plan]) -> None:
    recipe, plan = planned
    one = replace(plan, strategy="single", world_size=1, gpus_per_node=1)
    # One unit of work takes 0.01 s; the first steps of the attempt and one beside a backup say little.
    seconds = {step: 0.01 * work_of_steps(recipe, INDEX, one, step, step) for step in range(1, 11)}
    seconds |= {1: 1e6, 2: 1e6, 7: 1e6}
    remember_speed(recipe, INDEX, one, H100, seconds)
    by_layout = {
        (each.strategy, each.world_size): each for each in forecasts(recipe, INDEX, plan, H100, None, None)
    }
    whole = 0.01 * work_of_steps(recipe, INDEX, plan, 1, plan.max_steps)
    assert by_layout["single", 1].hours * 3600 == pytest.approx(whole)
    assert by_layout["single", 1].source == "measured here over 7 steps"
    assert by_layout["ddp", 4].hours * 3600 == pytest.approx(whole / 4 / EFFICIENCY["ddp", 4])
    assert "measured here on single x 1" in by_layout["ddp", 4].source
    other = embedded_recipe("training.num_train_epochs=1", "lora.r=64")
    assert speed_key(other) != speed_key(recipe)
    assert {each.source for each in forecasts(other, INDEX, plan, H100, None, None)} == {SCALED}


def test_too_few_steps_or_a_damaged_file_say_nothing(planned: tuple[Recipe, Plan]) -> None:
    recipe, plan = planned
    assert work_per_second(recipe, INDEX, plan, {4: 1.0, 5: 1.0}) is None
    remember_speed(recipe, INDEX, plan, H100, dict.fromkeys(range(1, 6), 1.0))
    assert not speeds_file().exists()
    for text in ("{", "3", '[3, {"recipe": 1}]', '[{"work_per_second": "x"}]'):
        speeds_file().write_text(text)
        assert read_speeds() == []


@pytest.mark.parametrize(
    "card", ["", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "NVIDIA H200 NVL"]
)
def test_a_card_of_which_nothing_is_known_has_no_forecast(card: str, planned: tuple[Recipe, Plan]) -> None:
    assert forecasts(planned[0], INDEX, planned[1], card, None, None) == []


@pytest.mark.parametrize(
    "other",
    [{"world_size": 8}, {"nodes": 2}, {"device": "cpu"}, {"global_batch_size": 16}, {"strategy": "zero2"}],
)
def test_a_layout_that_was_not_measured_has_no_forecast(
    other: dict[str, int | str], planned: tuple[Recipe, Plan]
) -> None:
    plan = replace(planned[1], **other)  # type: ignore[arg-type]
    known = forecasts(planned[0], INDEX, plan, H100, None, None)
    own = plan.strategy, plan.world_size, plan.nodes
    assert own not in [(each.strategy, each.world_size, each.nodes) for each in known]
