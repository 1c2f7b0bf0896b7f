"""The forecast of a plan."""

from dataclasses import replace

import numpy as np
import pytest

from launch.planning import forecast
from launch.planning.forecast import forecast_line, forecast_of, tokens_of_steps
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan
from launch.planning.run_steps import stream_of
from launch.planning.topology import Topology
from launch.recipe.schema import Recipe
from tests.helpers.indexes import SHAPE, embedded_recipe, make_index

H100 = "NVIDIA H100 80GB HBM3"
INDEX = make_index(330)


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


def test_every_token_of_the_trained_samples_is_counted_once(planned: tuple[Recipe, Plan]) -> None:
    recipe, plan = planned
    lengths = INDEX.splits["train"].tokens
    order = np.concatenate([stream_of(recipe, plan).samples(step) for step in range(10)])
    assert tokens_of_steps(recipe, INDEX, plan) == lengths[order].sum()


def test_time_cost_and_energy_follow_from_the_tabled_speed(planned: tuple[Recipe, Plan]) -> None:
    expected = forecast_of(*planned[:1], INDEX, planned[1], H100, 2.0, 500.0)
    assert expected is not None
    assert expected.hours == pytest.approx(expected.tokens / (16_206 * 4 * 0.93) / 3600)
    assert expected.gpu_hours == pytest.approx(4 * expected.hours)
    assert (expected.cost, expected.energy_kwh) == (2 * expected.gpu_hours, 0.5 * expected.gpu_hours)
    line = forecast_line(expected)
    assert f"tabled 60,286 tokens/s for {H100} (one H100" in line
    assert "not measured here" in line


@pytest.mark.parametrize("card", ["", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB"])
def test_a_card_that_is_not_tabled_has_no_forecast(card: str, planned: tuple[Recipe, Plan]) -> None:
    assert forecast_of(planned[0], INDEX, planned[1], card, None, None) is None


@pytest.mark.parametrize(
    "other",
    [{"world_size": 8}, {"nodes": 2}, {"device": "cpu"}, {"global_batch_size": 16}, {"strategy": "zero2"}],
)
def test_a_layout_that_was_not_measured_has_no_forecast(
    other: dict[str, int | str], planned: tuple[Recipe, Plan]
) -> None:
    plan = replace(planned[1], **other)  # type: ignore[arg-type]
    assert forecast_of(planned[0], INDEX, plan, H100, None, None) is None
