"""A run that another library began goes on here: adapter, moments and step, and what is lost is said."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoints.manifest import read_manifest
from launch.checkpoints.scan import newest_valid
from launch.cli import main as cli
from launch.errors import ConfigError
from launch.local.import_checkpoint import import_foreign_checkpoint
from launch.local.planned_run import RunRequest
from launch.recipe.loading import recipe_from_dict
from launch.run.continuation import Continuation
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from tests.helpers.attempts import planned
from tests.helpers.distributed.recorded import adapter_of, metrics_of, run_of, write_recipe
from tests.helpers.launcher import EMBEDDED, samestep, stand_in
from tests.helpers.merging import make_adapter
from trainer.checkpoint.resume import refuse_different_run
from trainer.formats.detect import import_checkpoint
from trainer.formats.key_names import adapter_key
from trainer.import_checkpoint import main, write_checkpoint
from trainer.task import Task
from trainer.train import main as train


def _recipe(world: Path, foreign: Path, file: Path) -> Path:
    """A recipe with the LoRA of the foreign runs."""
    config = json.loads((foreign / "ddp" / "checkpoint-3" / "adapter_config.json").read_text())
    lora = {key: config[key] for key in ("r", "lora_alpha", "lora_dropout")}
    return write_recipe(world, file, lora=lora | {"target_modules": sorted(config["target_modules"])})


@pytest.mark.parametrize("engine", ["ddp", "fsdp_sharded", "zero2"])
def test_adapter_moments_and_step_are_taken_over(
    world: Path, foreign: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(world, foreign, tmp_path / "recipe.yaml")
    source = foreign / engine / "checkpoint-3"
    assert main([str(recipe), str(source), "--output", str(tmp_path / "taken")]) == 0
    said = capsys.readouterr().out
    assert "imported: the adapter" in said
    assert "the optimizer's moments of" in said
    assert "not imported: the order of its samples: this run goes on at sample 24" in said
    assert "not imported: which weights its base had" in said
    taken = tmp_path / "taken" / "checkpoint-3"
    read_manifest(taken, verify=True)
    truth = load_file(foreign / engine / "truth.safetensors")
    optimizer_state = load_file(taken / "optimizer.safetensors")
    stored = load_file(taken / "adapter_model.safetensors")
    weights = [name for name in truth if ".lora_" in name and name.endswith(".weight")]
    assert weights
    assert all(torch.equal(stored[adapter_key(name)[0]], truth[name].float()) for name in weights)
    compared = [name for name in truth if name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert compared
    assert all(torch.equal(optimizer_state[name], truth[name].float()) for name in compared)
    assert train([str(recipe), "--runs-dir", str(tmp_path), "--name", "on", "--from", str(taken)]) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "on")] == [4, 5, 6, 7, 8]
    before, after = load_file(taken / "adapter_model.safetensors"), adapter_of(tmp_path / "on")
    assert before.keys() == after.keys()
    steps = load_file(tmp_path / "on" / "checkpoint-8" / "optimizer.safetensors")
    assert {int(value) for name, value in steps.items() if name.endswith(".step")} == {8}


@pytest.mark.parametrize("given", ["", "adapter"])
def test_a_whole_run_is_no_checkpoint_of_another_library(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = stand_in(monkeypatch, tmp_path)
    fake.saves = (2, 4)
    assert samestep("run", *EMBEDDED, "--name", "old") == 0
    asked = [*EMBEDDED, "--name", "new", "--from", str(tmp_path / "runs" / "old" / given)]
    with pytest.raises(
        ConfigError, match=r"is a run, not one of its checkpoints; give its newest, .*checkpoint-4"
    ):
        import_foreign_checkpoint(
            RunRequest(
                recipe=asked[0],
                overrides=(),
                strategy=None,
                gpus_per_node=None,
                name="new",
                runs_dir=tmp_path / "runs",
                fresh=False,
                source=Path(asked[-1]),
            )
        )


def test_the_command_begins_a_run_with_it_and_the_same_command_goes_on(
    world: Path,
    foreign: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = _recipe(world, foreign, tmp_path / "recipe.yaml")
    command = ["samestep", "run", str(recipe), "--strategy", "single", "--runs-dir", str(tmp_path / "runs")]
    command += ["--from", str(foreign / "ddp" / "checkpoint-3")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "not imported: the learning-rate schedule" in capfd.readouterr().out
    assert run_of(tmp_path / "runs" / "small").facts(8)["step"] == 8
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "done already" in capfd.readouterr().out


def test_another_lora_is_refused_with_the_values(
    world: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(world, tmp_path / "recipe.yaml", lora={"r": 16, "lora_alpha": 99})
    taken = tmp_path / "taken"
    assert main([str(recipe), str(foreign / "ddp" / "checkpoint-3"), "--output", str(taken)]) == 0
    source = str(taken / "checkpoint-3")
    assert train([str(recipe), "--runs-dir", str(tmp_path), "--name", "on", "--from", source]) == 2
    said = capsys.readouterr().err
    assert "lora.r: the run has" in said
    assert "lora.lora_alpha: the run has 12, the recipe 99" in said
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(
    ("config", "known"),
    [(None, None), ({}, None), ({"revision": "main"}, None), ({"revision": "c" * 40}, "c" * 40)],
)
def test_a_base_of_which_only_a_name_is_known_is_not_called_the_recipes(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any] | None,
    known: str | None,
) -> None:
    recipe = recipe_from_dict(recipe_values(world))
    found = import_checkpoint(make_adapter(world / "base", tmp_path / "adapter", r=8))
    assert found.config is not None
    ours = {"lora_alpha": recipe.lora.lora_alpha, "lora_dropout": recipe.lora.lora_dropout}
    found = replace(found, config=None if config is None else {**found.config, **ours, **config})
    plan = planned(recipe, Continuation())
    index = cast(Any, SimpleNamespace(fingerprint=plan.dataset_fingerprint))
    taken = write_checkpoint(recipe, index, found, tmp_path / "taken")
    assert read_manifest(taken)["facts"]["base_identity"] == known

    newest, _ = newest_valid(tmp_path / "taken")
    assert newest is not None
    run = RunDirectory(tmp_path / "run")
    monkeypatch.setattr("trainer.checkpoint.resume.old_base_identity", lambda _: known or "b" * 64)
    refuse_different_run(Task(recipe, plan, index, run), newest)
    if known:
        monkeypatch.setattr("trainer.checkpoint.resume.old_base_identity", lambda _: "b" * 64)
        with pytest.raises(ConfigError, match=r"model\.content: the run has 'c"):
            refuse_different_run(Task(recipe, plan, index, run), newest)


def test_a_folder_that_holds_nothing_is_refused(
    world: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe(world, foreign, tmp_path / "recipe.yaml")
    (tmp_path / "empty").mkdir()
    assert main([str(recipe), str(tmp_path / "empty"), "--output", str(tmp_path / "taken")]) == 2
    assert "no checkpoint of a known form" in capsys.readouterr().err
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"use_rslora": True}, "use_rslora"), ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa")],
)
def test_what_a_run_cannot_continue_is_refused_by_name(
    world: Path,
    foreign: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    named: str,
) -> None:
    recipe = _recipe(world, foreign, tmp_path / "recipe.yaml")
    source = tmp_path / "source"
    shutil.copytree(foreign / "ddp" / "checkpoint-3", source)
    config = source / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert main([str(recipe), str(source), "--output", str(tmp_path / "taken")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "taken").exists()
