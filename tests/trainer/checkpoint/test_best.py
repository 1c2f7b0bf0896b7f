"""The best checkpoint stays and becomes adapter-best/; a run that stopped improving ends, the same after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.run.directory import RunDirectory, clear_markers, read_marker
from tests.helpers.distributed.launching import published_steps
from tests.helpers.distributed.recorded import evaluations_of, metrics_of, sha256_of, write_recipe
from trainer.metrics_log import append_line
from trainer.train import main

LOSSES = {2: 5.0, 4: 4.0, 6: 3.0, 8: 3.5, 10: 3.2, 12: 3.1}
"""What the evaluations of the runs find, by step: the best at 6, two without gain after it."""


@pytest.fixture(scope="module", autouse=True)
def scripted_losses() -> Iterator[None]:
    def append(file: Path, values: dict[str, Any]) -> None:
        is_evaluation = file.name == "evaluations.jsonl"
        append_line(file, {**values, "loss": LOSSES[values["step"]]} if is_evaluation else values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.loop.callbacks.append_line", append)
        yield


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        world,
        tmp_path_factory.mktemp("best") / "recipe.yaml",
        "plain",
        training={"max_steps": 12},
        checkpoint={"every_steps": 100, "keep": 2, "keep_best": "eval_loss"},
        evaluation={"every_steps": 2, "max_samples": 4, "early_stop": 2},
    )


def train(recipe: Path, *more: str) -> int:
    return main([str(recipe), "--runs-dir", str(recipe.parent), "--name", "run", *more])


@pytest.fixture(scope="module")
def ended(recipe: Path) -> RunDirectory:
    assert train(recipe) == 0
    return RunDirectory(recipe.parent / "run")


def copy(ended: RunDirectory, folder: Path, *without: int) -> Path:
    """The recipe beside a copy of the run as a kill left it, before the checkpoints `without` were published."""
    shutil.copytree(ended.path.parent, folder, dirs_exist_ok=True)
    run = RunDirectory(folder / "run")
    clear_markers(run)
    for place in (run.adapter, run.best_adapter, *(run.checkpoint(step) for step in without)):
        shutil.rmtree(place)
    return folder / "recipe.yaml"


def test_a_run_without_gain_ends_and_its_best_checkpoint_outlives_rotation(ended: RunDirectory) -> None:
    assert [line["step"] for line in evaluations_of(ended.path)] == [2, 4, 6, 8, 10]
    assert metrics_of(ended.path)[-1]["step"] == 10
    marker = read_marker(ended)
    assert marker is not None
    assert (marker.kind, marker.text) == ("DONE", "step 10")
    assert published_steps(ended.path) == [2, 4, 6, 10][1:]  # two newest beside the best
    record = json.loads((ended.best_adapter / "best.json").read_text())
    assert record == {"step": 6, "metric": "eval_loss", "value": 3.0}
    best, kept = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (ended.best_adapter, ended.checkpoint(6))
    )
    assert best.keys() == kept.keys()
    assert all(torch.equal(best[name], kept[name]) for name in best)
    assert (ended.best_adapter / "README.md").is_file()
    assert (ended.best_adapter / "tokenizer.json").is_file()
    assert not torch.equal(
        *(
            load_file(f / "adapter_model.safetensors")[next(iter(best))]
            for f in (ended.adapter, ended.best_adapter)
        )
    )


def test_the_same_command_finds_it_done_and_more_patience_goes_on(
    ended: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sha256_of(ended.path)
    assert train(ended.path.parent / "recipe.yaml") == 0
    assert "done already" in caplog.text
    assert sha256_of(ended.path) == before
    recipe = copy(ended, tmp_path)
    assert train(recipe, "--set", "evaluation.early_stop=3") == 0
    run = RunDirectory(tmp_path / "run")
    marker = read_marker(run)
    assert marker is not None
    assert marker.text == "step 12"
    assert 6 in published_steps(run.path)
    assert json.loads((run.best_adapter / "best.json").read_text())["step"] == 6


@pytest.mark.parametrize("without", [(), (10,)], ids=["before the result", "before the last checkpoint"])
def test_a_killed_run_comes_to_the_same_end(
    without: tuple[int, ...], ended: RunDirectory, tmp_path: Path
) -> None:
    recipe = copy(ended, tmp_path, *without)
    assert train(recipe) == 0
    run = RunDirectory(tmp_path / "run")
    marker = read_marker(run)
    assert marker is not None
    assert marker.text == "step 10"
    assert sha256_of(run.path) == sha256_of(ended.path)
    names = ("best.json", "adapter_model.safetensors")
    for name in names:
        assert (run.best_adapter / name).read_bytes() == (ended.best_adapter / name).read_bytes()
