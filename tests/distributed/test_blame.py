"""The samples of a step with their own losses, and a run without one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.report.records import read_records
from launch.report.write import write_report
from launch.run.directory import RunDirectory
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import metrics_of, write_recipe
from tests.helpers.launcher import samestep


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps in one process, a checkpoint after 4, a validation loss after 2, 4, 6, 8."""
    folder = tmp_path_factory.mktemp("blame")
    recipe = write_recipe(world, folder / "recipe.yaml", checkpoint={"every_steps": 4})
    drive(1, [([str(recipe), "--runs-dir", str(folder), "--name", "one"], None)], folder)
    return folder / "one"


def test_the_losses_of_a_steps_samples_add_up_to_it_and_a_row_left_out_takes_its_part_away(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    recorded = {line["step"]: line for line in metrics_of(run)}
    assert samestep("blame", str(run), "--step", "6", "--json") == 0
    printed = capfd.readouterr().out
    ranked = json.loads(printed[printed.index("{\n") :])
    assert ranked["checkpoint"] == "checkpoint-4"
    assert ranked["agrees"]
    assert ranked["loss"] == pytest.approx(recorded[6]["loss"], rel=1e-6)
    shares = [each["share"] for each in ranked["samples"]]
    assert len(shares) == 8
    assert shares == sorted(shares, reverse=True)
    worst = ranked["samples"][0]
    assert worst["question"].startswith("How high is bar")

    row = str(worst["row"])
    assert samestep("blame", str(run), "--step", "6", "--without", row, "--until", "8", "--json") == 0
    printed = capfd.readouterr().out
    changed = json.loads(printed[printed.index("{\n") :])
    assert changed["samples"] == ranked["samples"]
    without = {(each["step"], each["name"]): each for each in changed["steps"]}
    assert {step for step, name in without if name == "loss"} == {6, 7, 8}
    # At the step itself the weights are still the run's: its loss lacks the row's share, to the last digits.
    assert without[6, "loss"]["without"] == pytest.approx(recorded[6]["loss"] - worst["share"], rel=1e-6)
    assert without[6, "grad_norm"]["without"] != recorded[6]["grad_norm"]
    assert without[8, "eval_loss"]["without"] != without[8, "eval_loss"]["recorded"]

    now = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert now.keys() - files.keys() == {run / "blame" / "step-6.json"}
    assert {file: now[file] for file in files} == files
    (step,) = read_records(RunDirectory(run)).blamed
    assert (step.step, step.without, len(step.changes)) == (6, (worst["row"],), len(changed["steps"]))
    page = write_report([RunDirectory(run)]).read_text()
    assert "Step 6, loss" in page
    assert f'alt="chart of row {row}"' in page

    damaged = run / "blame" / "step-7.json"
    damaged.write_text('{"step": 7, "samples": 3}')
    records = read_records(RunDirectory(run))
    assert [each.step for each in records.blamed] == [6]
    assert any("step-7.json" in problem for problem in records.problems)
    damaged.unlink()


def test_a_step_from_before_a_change_that_was_allowed_is_blamed_with_it_named(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = run.parent
    asked = [str(folder / "recipe.yaml"), "--runs-dir", str(folder), "--name", "two"]
    changed = ["--set", "training.learning_rate=9e-5", "--allow", "training.learning_rate"]
    drive(1, [(asked, 4), ([*asked, *changed], None)], folder)
    for step, named in ((2, ["training.learning_rate was 0.0002 and is 9e-05"]), (6, [])):
        capfd.readouterr()
        assert samestep("blame", str(folder / "two"), "--step", str(step), "--json") == 0
        printed = capfd.readouterr().out
        assert json.loads(printed[printed.index("{\n") :])["changed"] == named


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--step", "9"], "is not among the steps 1 to 8"),
        (["--step", "2", "--until", "4"], "belongs to --without"),
        (["--step", "6", "--without", "1", "--until", "5"], "is not among the steps 6 to 8"),
        (["--step", "6", "--without", "9999"], "row 9999 is not among the samples of step 6"),
    ],
)
def test_what_the_run_did_not_train_on_is_refused(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("blame", str(run), *options) == 2
    assert words in capsys.readouterr().err
