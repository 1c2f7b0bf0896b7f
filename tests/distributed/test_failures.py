"""What goes wrong on one rank stops all of them, with its reason, and costs no data."""

from __future__ import annotations

import json
from pathlib import Path

from launch.recipe import dump_recipe, recipe_from_dict
from tests.conftest import recipe_values
from tests.distributed.launching import accelerate_launch


def test_a_nan_on_one_rank_stops_all_before_the_weights_change(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    values = recipe_values(world)
    values["checkpoint"] = {"every_steps": 1}
    recipe.write_text(dump_recipe(recipe_from_dict(values)))
    arguments = [
        "tests.distributed.fail_on_rank_1",
        str(recipe),
        "--runs-dir",
        str(tmp_path),
        "--name",
        "run",
    ]
    ended = accelerate_launch(2, arguments)
    assert ended.returncode != 0
    assert ended.stdout.count("error: step 2: the loss is nan") == 1
    assert "the weights are unchanged; the step's samples are [" in ended.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "DONE").exists()
