"""`--strategy auto`: which strategy it takes on which GPUs, and why."""

from dataclasses import replace

import pytest

from launch.planning.auto_strategy import resolve_strategy
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan
from launch.planning.plan_table import plan_rows
from launch.planning.step_plan import StreamOffset
from launch.planning.topology import Topology
from launch.strategies import AUTO, STRATEGIES
from launch.units import GIB
from tests.helpers.indexes import SHAPE, embedded_recipe, make_index

CHARTS = make_index(330, longest=1200)
RECIPE = (
    "model.dtype=bfloat16",
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "training.gradient_checkpointing=auto",
    "batch.micro_batch_tokens=auto",
    "lora.target_modules=[q_proj, v_proj]",
)
EIGHT = Topology(AUTO, 2, 4, "cuda", 80 * GIB)


def resolved(topology: Topology, *overrides: str) -> Topology:
    return resolve_strategy(embedded_recipe(*RECIPE, *overrides), CHARTS, topology, StreamOffset())


@pytest.fixture(autouse=True)
def seven_b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: SHAPE)


@pytest.mark.parametrize(
    ("topology", "strategy", "reason"),
    [
        (replace(EIGHT, nodes=1, gpus_per_node=1), "single", "one process"),
        (replace(EIGHT, device="cpu"), "ddp", "no GPU here"),
        (replace(EIGHT, gpu_memory=None), "ddp", "the memory of the GPUs is not known"),
        (EIGHT, "ddp", "ddp needs "),
        (replace(EIGHT, gpu_memory=6 * GIB), "fsdp", " of 6.0 GiB, fsdp "),
        (replace(EIGHT, gpu_memory=2 * GIB), "fsdp", " of 2.0 GiB, fsdp "),
    ],
)
def test_the_fastest_strategy_that_fits_is_taken_and_the_reason_is_said(
    topology: Topology, strategy: str, reason: str
) -> None:
    taken = resolved(topology)
    assert taken.strategy == strategy
    assert reason in taken.strategy_reason


def test_a_strategy_that_was_named_stays_whatever_fits() -> None:
    for name in STRATEGIES:
        named = replace(EIGHT, strategy=name, gpu_memory=2 * GIB)
        assert resolved(named) == named
        assert resolved(named).strategy_reason == ""


def test_fsdp_is_not_taken_where_a_rule_refuses_it() -> None:
    taken = resolved(replace(EIGHT, gpu_memory=2 * GIB), "lora.use_dora=true")
    assert taken.strategy == "ddp"
    assert "and fsdp is refused (lora.use_dora: " in taken.strategy_reason


def test_the_reason_is_in_the_plan_and_in_its_table() -> None:
    topology = resolved(replace(EIGHT, gpu_memory=6 * GIB))
    plan = make_plan(embedded_recipe(*RECIPE), CHARTS, topology)
    assert Plan.from_json(plan.to_json()).strategy_reason == topology.strategy_reason
    assert dict(plan_rows(plan))["strategy"] == f"fsdp (auto: {topology.strategy_reason})"
    assert plan.topology == topology
    named = make_plan(embedded_recipe(*RECIPE), CHARTS, replace(topology, strategy_reason=""))
    assert dict(plan_rows(named))["strategy"] == "fsdp"
