"""Trackers: the real libraries, without a network, one run over two attempts; a failing one stops nothing."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from trainer.loop import trackers
from trainer.loop.trackers import TrackerCallback, tracking_name


@pytest.fixture
def recipe(world: Path) -> Recipe:
    return recipe_from_dict({**recipe_values(world), "tracking": {"report_to": "none", "project": "charts"}})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A new run, on a machine whose user has configured no tracker."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = RunDirectory(tmp_path / "runs" / "mine")
    run.path.mkdir(parents=True)
    return run


def attempt(callback: TrainerCallback, *steps: int, finish: bool = True) -> None:
    """What a training calls, with a loss of 1/step; not finished when it is killed."""
    callback.on_train_begin(None, None, None)  # type: ignore[arg-type]
    for step in steps:
        state = SimpleNamespace(global_step=step)
        callback.on_log(None, state, None, {"loss": 1 / step, "tokens_per_second": 9.0})  # type: ignore[arg-type]
    if finish:
        callback.on_train_end(None, None, None)  # type: ignore[arg-type]


def tracker(name: str, recipe: Recipe, run: RunDirectory, resumed_at: int = 0) -> TrackerCallback:
    return TrackerCallback([name], recipe, run, resumed_at)


def test_tensorboard_shows_every_step_once_after_a_resume(recipe: Recipe, run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attempt(tracker("tensorboard", recipe, run), 1, 2, 3, 4, finish=False)
    attempt(tracker("tensorboard", recipe, run, resumed_at=2), 3, 4, 5)
    shown = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert "tokens_per_second" in shown.Tags()["scalars"]


def test_mlflow_has_one_run_over_two_attempts(recipe: Recipe, run: RunDirectory) -> None:
    from mlflow import MlflowClient

    attempt(tracker("mlflow", recipe, run), 1, 2, finish=False)
    attempt(tracker("mlflow", recipe, run, resumed_at=2), 3)
    client = MlflowClient((run.path.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("charts")
    (found,) = client.search_runs([experiment.experiment_id])
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "loss")] == [1, 2, 3]
    assert found.data.params["lora.r"] == str(recipe.lora.r)
    assert found.info.status == "FINISHED"


def test_wandb_goes_offline_without_a_key_and_keeps_one_id(recipe: Recipe, run: RunDirectory) -> None:
    attempt(tracker("wandb", recipe, run), 1, 2)
    attempt(tracker("wandb", recipe, run, resumed_at=2), 3)
    folders = [*(run.path / "wandb").glob("offline-run-*")]
    assert len(folders) >= 1
    assert {folder.name.split("-", 3)[3] for folder in folders} == {tracking_name(run)}


def test_trackio_has_one_run_over_two_attempts(
    recipe: Recipe, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    attempt(tracker("trackio", recipe, run), 1, 2)
    attempt(tracker("trackio", recipe, run, resumed_at=2), 3)
    assert SQLiteStorage.get_runs("charts") == [tracking_name(run)]
    logs = SQLiteStorage.get_logs("charts", tracking_name(run))
    assert [line["step"] for line in logs] == [1, 2, 3]
    assert logs[0]["tokens_per_second"] == 9.0


def test_a_space_is_handed_to_trackio_and_one_that_cannot_be_reached_is_one_warning(
    recipe: Recipe,
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A Space's address is fixed, https://<owner>-<name>.hf.space, so no local server can stand in for one."""
    asked: list[dict[str, Any]] = []

    def init(**arguments: Any) -> None:
        asked.append(arguments)
        print("Found existing space")
        raise ConnectionError("no route to the Space")

    monkeypatch.setattr("trackio.init", init)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://elsewhere")
    for space in ("me/charts", None):
        tracking = recipe.tracking.model_copy(update={"space_id": space})
        attempt(tracker("trackio", recipe.model_copy(update={"tracking": tracking}), run), 1)
    assert [(each["space_id"], each["name"], each["resume"]) for each in asked] == [
        ("me/charts", tracking_name(run), "allow"),
        (None, tracking_name(run), "allow"),
    ]
    assert "TRACKIO_SERVER_URL" not in os.environ  # a recipe without a Space stays on this machine
    assert capsys.readouterr().out.count("Found existing space") == 1
    assert caplog.text.count("trackio: not used (ConnectionError: no route to the Space)") == 2


def test_a_tracker_that_fails_is_one_warning_and_leaves_the_others(
    recipe: Recipe, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    class Broken:
        def log(self, figures: object, step: int) -> None:
            calls.append(step)
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers.OPEN, "wandb", lambda *_: Broken())
    attempt(TrackerCallback(["wandb", "tensorboard"], recipe, run, 0), 1, 2, 3)
    assert calls == [1]
    assert len([*(run.path / "tensorboard").iterdir()]) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "wandb: not used (ConnectionError: no route)"
    ]
    monkeypatch.setitem(trackers.OPEN, "mlflow", lambda *_: 1 / 0)
    attempt(tracker("mlflow", recipe, run), 1)
    assert "mlflow: not used (ZeroDivisionError" in caplog.text
