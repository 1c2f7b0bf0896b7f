"""What goes wrong on one rank stops all of them, with its reason, and costs no data."""

from __future__ import annotations

import json
from pathlib import Path

from launch.recipe import dump_recipe, recipe_from_dict
from tests.conftest import recipe_values
from tests.distributed.launching import accelerate_launch


def test_what_one_rank_alone_sees_stops_all_with_its_reason(world: Path, tmp_path: Path) -> None:
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
    assert ended.stdout.count("rank 0 ended with: ") == 1  # whose thread failed to save
    assert "checkpoint-2.partial: No space left on device; make room" in ended.stdout
    assert ended.stdout.count("rank 1 ended with: rank 0: could not write; see its words") == 1
    left = {folder.name for folder in (tmp_path / "full").glob("checkpoint-*")}
    # The ranks hear of it in the next step, or in the one after when the thread took that long.
    assert {"checkpoint-1"} <= left <= {"checkpoint-1", "checkpoint-3"}
    assert not (tmp_path / "full" / "adapter").exists()

    assert ended.returncode != 0
    assert ended.stdout.count("error: step 2: the loss is nan") == 1
    assert "the weights are unchanged; the step's samples are [" in ended.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "DONE").exists()
