"""What `samestep evaluate` is given: found by name or path, or refused with what there is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.errors import ConfigError
from launch.recipe.loading import find_recipe, load_recipe
from launch.run.directory import RunDirectory
from launch.run.evaluation_target import default_models, find_target, missing_models
from tests.helpers.launcher import Launcher, flag, samestep, stand_in, write_adapter

EMBEDDED = ["embedded", "--set", "batch.global_batch_size=32", "--set", "training.max_steps=6"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return stand_in(monkeypatch, tmp_path)


@pytest.fixture
def run(launcher: Launcher) -> RunDirectory:
    """A run that was stopped at step 4, with the checkpoints of steps 2 and 4."""
    launcher.marker, launcher.saves = "STOPPED", (2, 4)
    samestep("run", *EMBEDDED)
    return RunDirectory(Path("runs/embedded").absolute())


def test_a_stopped_run_is_evaluated_at_its_newest_checkpoint(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert default_models(run) == ("base", "checkpoint-4")
    assert samestep("evaluate", "embedded") == 0
    assert flag(launcher.commands[-1], "--models") == "base,checkpoint-4"
    assert samestep("evaluate", "embedded", "--models", "base,checkpoint-2-no-prompt", "--json") == 0
    assert "--json" in launcher.commands[-1]
    started = len(launcher.commands)
    assert samestep("evaluate", "embedded", "--models", "adapter,checkpoint-3") == 2
    said = capsys.readouterr().err
    assert "no adapter yet" in said
    assert "until then ask checkpoint-4 (--models base,checkpoint-4)" in said
    assert "has no checkpoint-3 (there are: checkpoint-2, checkpoint-4)" in said
    assert samestep("evaluate", "embedded", "--models", "best") == 2
    assert "adapter-best: no best adapter" in capsys.readouterr().err
    assert len(launcher.commands) == started


def test_what_lies_in_a_run_is_found_there(run: RunDirectory) -> None:
    assert find_target("runs/embedded/checkpoint-4", Path("runs")).checkpoint == 4
    write_adapter(run.adapter)
    write_adapter(run.best_adapter)
    assert default_models(run) == ("base", "adapter", "shuffled")
    assert find_target("runs/embedded/adapter", Path("runs")).models == ("base", "adapter", "shuffled")
    assert find_target("runs/embedded/adapter-best", Path("runs")).models == ("base", "best")
    assert missing_models(run, ["best", "adapter", "checkpoint-2"]) == []
    assert missing_models(run, ["best"], checkpoint=2)[0].startswith("--models: best is of the run's last")
    with pytest.raises(ConfigError, match="checkpoint-7: no such checkpoint"):
        find_target("runs/embedded/checkpoint-7", Path("runs"))
    with pytest.raises(ConfigError, match=r"--set: embedded belongs to .*; leave it out"):
        find_target("embedded", Path("runs"), None, ["name=x"])


def test_a_recipe_is_evaluated_before_its_run_and_leaves_the_name_free(launcher: Launcher) -> None:
    assert samestep("evaluate", "embedded", "--set", "name=early", "--max-samples", "5") == 0
    command = launcher.commands[-1]
    assert Path(flag(command, "--recipe")) == find_recipe("embedded").absolute()
    assert flag(command, "--set") == "name=early"
    assert flag(command, "--models") == "base"
    assert not Path("runs/early").exists()  # nothing was written
    Path("runs/early/answers").mkdir(parents=True)
    assert samestep("run", *EMBEDDED, "--name", "early") == 0
    assert Path("runs/early/answers").is_dir()
    assert Path("runs/early/recipe.yaml").is_file()


def test_validation_is_asked_where_the_recipe_has_no_test_split(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    without_test = ("evaluate", "embedded", "--set", "data.test=null")
    assert samestep(*without_test) == 0
    assert flag(launcher.commands[-1], "--split") == "validation"
    assert "no test split: asking the questions of validation" in capsys.readouterr().err
    assert samestep(*without_test, "--split", "test") == 2
    assert "no test split (data.test is null); choose train or validation" in capsys.readouterr().err
    assert samestep(*without_test, "--set", "data.validation=null") == 2
    assert "choose train" in capsys.readouterr().err


def test_one_question_is_not_asked_of_exchanged_images_unless_somebody_wants_it(
    launcher: Launcher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert samestep("run", *EMBEDDED) == 0
    index = SimpleNamespace(splits={"train": range(60), "test": range(12)})
    monkeypatch.setattr("launch.run.evaluation_target.read_index", lambda _: index)
    write_adapter(RunDirectory(Path("runs/embedded")).adapter, 1.0)
    for arguments, models in (
        ([], "base,adapter,shuffled"),
        (["--max-samples", "1"], "base,adapter"),
        (["--max-samples", "1", "--models", "adapter,shuffled"], "adapter,shuffled"),
    ):
        assert samestep("evaluate", "embedded", *arguments) == 0
        assert flag(launcher.commands[-1], "--models") == models
    assert capsys.readouterr().err.count("shuffled is left out: only one question is asked") == 1


def test_a_recipe_whose_run_has_begun_is_that_run(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(find_recipe("embedded"))
    assert samestep("evaluate", file, "--models", "checkpoint-4") == 0
    assert "--recipe" not in launcher.commands[-1]
    assert samestep("evaluate", file, "--set", "data.system_message=Hello") == 2
    said = capsys.readouterr().err
    assert "data.system_message: the run has" in said
    assert "--set name=NAME" in said


def test_what_lies_in_no_run_needs_a_recipe_that_names_the_data(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(Path("theirs"))
    model = Path("model")
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"dtype": "float32"}))
    for place in ("theirs", "model"):
        assert samestep("evaluate", place) == 2
        assert f"--recipe: missing ({place} lies in no run" in capsys.readouterr().err
    assert launcher.commands == []
    assert samestep("evaluate", "theirs", "--recipe", "embedded") == 0
    command = launcher.commands[-1]
    assert flag(command, "--adapter") == str(Path("theirs").absolute())
    assert flag(command, "--models") == "base,adapter"
    assert flag(command, "--label") == f"{Path.cwd().name}-theirs"
    target = find_target("model", Path("runs"), "embedded")
    recipe = load_recipe(target.recipe or "", target.overrides)
    assert recipe.model.name_or_path == str(model.absolute())
    assert (recipe.model.dtype, recipe.quantization.load_in_4bit, target.models) == (
        "float32",
        False,
        ("base",),
    )
    (model / "config.json").write_text(json.dumps({"dtype": "float8"}))
    assert samestep("evaluate", "model", "--recipe", "embedded") == 2
    assert "its weights are float8" in capsys.readouterr().err
    hub = find_target("owner/name", Path("runs"), "embedded")
    assert "model.name_or_path=owner/name" in hub.overrides
    assert hub.label.endswith("owner-name")


def test_an_interrupted_evaluation_says_that_it_goes_on(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.interrupted, launcher.status = True, 130
    assert samestep("evaluate", "embedded") == 130
    assert "the same command goes on with the answers so far" in capsys.readouterr().err
