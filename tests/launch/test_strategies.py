"""What each strategy says of itself, held against the shipped configurations."""

import pytest

from launch.rules.accelerate_config import launched_strategy, shipped_config
from launch.strategies import STRATEGIES, Strategy, default_strategy


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_strategy_launches_with_the_engine_and_stage_that_it_says(strategy: Strategy) -> None:
    config = shipped_config(strategy.name)
    assert launched_strategy(config, several=not strategy.is_one_process) == strategy.name
    assert bool(config.deepspeed) == strategy.is_zero
    assert bool(config.fsdp) == (strategy.engine == "fsdp")
    assert config.deepspeed.get("zero_optimization", {}).get("stage", 0) == strategy.zero_stage


def test_only_what_is_shared_out_is_stored_as_a_float() -> None:
    stored = {name: strategy.quant_storage for name, strategy in STRATEGIES.items()}
    assert [name for name, dtype in stored.items() if dtype != "uint8"] == ["fsdp", "zero3"]
    assert [name for name, strategy in STRATEGIES.items() if strategy.shards_layers] == ["fsdp", "zero3"]


def test_models_are_compared_where_an_engine_wraps_them() -> None:
    compared = [name for name, strategy in STRATEGIES.items() if strategy.is_compared_when_wrapped]
    assert compared == ["ddp", "zero2", "zero3"]


def test_a_request_without_a_strategy_replicates_the_model() -> None:
    assert (default_strategy(1).name, default_strategy(8).name) == ("single", "ddp")
