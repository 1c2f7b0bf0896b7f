"""Runs of an older version: they resume to the same run within rounding, are evaluated, and merge.

`tests/data/run_of_c54213f` was written by commit c54213f on the shared small world: `straight` took all 6 steps,
`stopped` was preempted after step 3. Their recipes name the base and the data where that machine had them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.audit.diff import compare_runs
from launch.run.directory import RunDirectory, is_done_at
from trainer.evaluation import generate
from trainer.export import merge
from trainer.train import main as train

OLD_RUN = Path(__file__).parents[1] / "data" / "run_of_c54213f"
OLD_WORLD = "/data/oldrun/charts_example"
MOVED = ["--allow", "model.name_or_path", "--allow", "data.dataset"]


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both runs and `recipe.yaml`, the recipe with the small world's places."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD_RUN, folder, dirs_exist_ok=True)
    text = (OLD_RUN / "stopped" / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(OLD_WORLD, str(world)))
    return folder


def figures(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines]


@pytest.fixture(scope="module")
def resumed(runs: Path) -> Path:
    assert train([str(runs / "recipe.yaml"), "--runs-dir", str(runs), "--name", "stopped", *MOVED]) == 0
    return runs / "stopped"


def test_a_stopped_run_of_an_older_version_goes_on_as_that_version_would_have(
    runs: Path, resumed: Path
) -> None:
    comparison = compare_runs(RunDirectory(runs / "straight"), RunDirectory(resumed))
    assert (comparison.steps, comparison.partings) == (6, ())
    ours, theirs = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (resumed, runs / "straight")
    )
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6
    assert figures(resumed)[:3] == figures(runs / "straight")[:3]
    assert is_done_at(RunDirectory(resumed), 6)


def test_a_finished_run_of_an_older_version_is_not_trained_again(runs: Path) -> None:
    before = (runs / "straight" / "metrics.jsonl").read_bytes()
    assert train([str(runs / "recipe.yaml"), "--runs-dir", str(runs), "--name", "straight", *MOVED]) == 0
    assert (runs / "straight" / "metrics.jsonl").read_bytes() == before


def test_a_run_of_an_older_version_is_evaluated(runs: Path, world: Path) -> None:
    recipe = runs / "straight" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(OLD_WORLD, str(world)))
    options = ["--run-dir", str(runs / "straight"), "--models", "base,adapter", "--max-samples", "4"]
    assert generate.main(options) == 0
    accuracy = json.loads((runs / "straight" / "eval-4.json").read_text())["accuracy"]
    assert set(accuracy) == {"base", "adapter"}


def test_a_run_of_an_older_version_merges(runs: Path, world: Path, tmp_path: Path) -> None:
    adapter = runs / "straight" / "adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace(OLD_WORLD, str(world)))
    assert merge.main([str(runs / "straight"), "--output", str(tmp_path / "merged")]) == 0
    merged, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", world / "base")
    )
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
