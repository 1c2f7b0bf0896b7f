"""Files that ship with the package."""

import pytest
import yaml

from launch.errors import ConfigError
from launch.resources import resource, resource_names
from launch.strategies import STRATEGIES


def test_every_strategy_has_a_configuration_without_numbers_of_a_run() -> None:
    assert {f"{strategy}.yaml" for strategy in STRATEGIES} <= set(resource_names("accelerate_configs"))
    for name in resource_names("accelerate_configs"):
        values = yaml.safe_load(resource("accelerate_configs", name).read_text())
        assert values.get("mixed_precision", "no") == "no"  # DeepSpeed's file would have to say it
        assert not values["use_cpu"]
        assert {"num_processes", "machine_rank", "gpu_ids"} & set(values) == set()


def test_a_missing_file_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"recipes/nothing\.yaml: no such file; there are embedded\.yaml"):
        resource("recipes", "nothing.yaml")
