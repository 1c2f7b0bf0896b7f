"""Two runs side by side: what differs, and the first step at which they part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.audit.diff import compare_runs, compare_steps, verdict
from launch.recipe.loading import dump_recipe, load_recipe
from launch.run.directory import RunDirectory
from tests.helpers.launcher import samestep

OLD_RUN = Path(__file__).parents[2] / "data" / "run_of_c54213f" / "straight"


@pytest.fixture
def left(tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(OLD_RUN, tmp_path / "left")))


@pytest.fixture
def right(tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(OLD_RUN, tmp_path / "right")))


def change_step(run: RunDirectory, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    change(lines[step - 1])
    run.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_copy_is_the_same_run_to_the_bit(left: RunDirectory, right: RunDirectory) -> None:
    comparison = compare_runs(left, right)
    assert comparison.differences == comparison.partings == ()
    assert comparison.same_adapter is True
    assert verdict(comparison) == "the same run: all figures of 6 common steps are equal to the bit"


def test_another_order_of_summation_is_told_from_a_fault(left: RunDirectory, right: RunDirectory) -> None:
    change_step(right, 3, lambda line: line.update(loss=line["loss"] * (1 + 2e-7)))
    comparison = compare_runs(left, right)
    assert (comparison.first, comparison.rounding_from) == (None, 3)
    assert "within rounding: losses differ from step 3 on, by 2.0e-07" in verdict(comparison)
    change_step(right, 4, lambda line: line.update(loss=line["loss"] * 1.001))
    first = compare_runs(left, right).first
    assert first is not None
    assert (first.quantity, first.step) == ("loss", 4)
    assert first.relative == pytest.approx(1e-3, rel=1e-2)


def test_rounding_grows_with_the_steps_since_the_first_that_rounded_otherwise() -> None:
    def steps(begin: int) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
        """Rounding from step `begin` on, and ten times what rounding explains of one step at step 70."""
        differs = {step: 1e-7 if step >= begin else 0.0 for step in range(1, 71)} | {70: 1e-5}
        return [(step, {"loss": 1.0}, {"loss": 1 + by}) for step, by in differs.items()]

    assert compare_steps(steps(begin=1), 1e-6)[0] == []
    (late,) = compare_steps(steps(begin=60), 1e-6)[0]
    assert (late.quantity, late.step, late.tolerance) == ("loss", 70, 3e-6)
    (alone,) = compare_steps(steps(begin=70), 1e-6)[0]
    assert (alone.step, alone.tolerance) == (70, 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples_digest": "0" * 16, "loss": 9.0}, "from step 2 on they train on other samples"),
        ({"target_tokens": 33, "loss": 9.0}, "at step 2 the same samples have other target tokens"),
        ({"loss": float("nan")}, "the loss of step 2 differs by inf"),
        ({"grad_norm": 1.0}, "the grad_norm of step 2 differs"),
    ],
)
def test_the_first_thing_that_parts_is_named(
    left: RunDirectory, right: RunDirectory, change: dict[str, Any], words: str
) -> None:
    change_step(right, 2, lambda line: line.update(change))
    change_step(right, 5, lambda line: line.update(loss=0.0))
    assert words in verdict(compare_runs(left, right))


def test_a_run_that_has_taken_fewer_steps_is_said_to_have(
    left: RunDirectory, right: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = right.metrics_file.read_text().splitlines(keepends=True)
    right.metrics_file.write_text("".join(lines[:4]))
    assert samestep("diff", str(left.path), str(right.path)) == 0
    assert "4 common steps (left has taken 6, right 4)" in capsys.readouterr().out


def test_recipe_plan_and_versions_that_differ_are_listed(left: RunDirectory, right: RunDirectory) -> None:
    for file, old, new in (
        (right.recipe_file, "learning_rate: 0.0002", "learning_rate: 0.0003"),
        (right.plan_file, '"world_size": 1', '"world_size": 4'),
        (right.environment_file, '"torch": "2.14.1"', '"torch": "2.11.0"'),
    ):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
    differences = {
        (each.section, each.key): (each.left, each.right) for each in compare_runs(left, right).differences
    }
    assert differences == {
        ("recipe", "training.learning_rate"): (0.0002, 0.0003),
        ("changed on the way", "training.learning_rate"): (
            "no change",
            "0.0002, then 0.0003",
        ),  # a checkpoint says so
        ("plan", "world_size"): (1, 4),
        ("versions", "torch"): ("2.14.1", "2.11.0"),
    }


def test_a_value_that_older_versions_did_not_know_is_shown_as_what_they_did(
    left: RunDirectory, right: RunDirectory
) -> None:
    for run, value in ((left, "true"), (right, "false")):
        recipe = load_recipe(run.recipe_file, [f"batch.prefix_sharing={value}"])
        run.recipe_file.write_text(dump_recipe(recipe))
    difference, changed = compare_runs(left, right).differences
    assert (changed.section, changed.left, changed.right) == (
        "changed on the way",
        "False, then True",
        "no change",
    )
    assert (difference.key, difference.left, difference.right) == ("batch.prefix_sharing", True, False)


def test_the_command_ends_with_1_when_they_part(
    left: RunDirectory, right: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("diff", str(left.path), str(right.path)) == 0
    assert "adapters equal to the byte" in capsys.readouterr().out
    change_step(right, 2, lambda line: line.update(loss=9.0))
    assert samestep("diff", str(left.path), str(right.path), "--json") == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["first"]["quantity"], values["first"]["step"]) == ("loss", 2)


def test_deep_has_nothing_to_look_into_where_neither_loss_nor_norm_parts(
    left: RunDirectory, right: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("diff", str(left.path), str(right.path), "--deep")
    assert samestep(*command) == 0
    printed = capsys.readouterr().out
    assert "adapters equal to the byte" in printed
    assert "there is no step to look into" in printed
    change_step(right, 3, lambda line: line.update(learning_rate=1.0))
    assert samestep(*command, "--json") == 1
    values = json.loads(capsys.readouterr().out)
    assert values["comparison"]["first"]["quantity"] == "learning_rate"
    assert values["deep"] is None


def test_runs_that_cannot_be_compared_are_one_line(
    left: RunDirectory, right: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right.metrics_file.write_text("{}\n" * 3)
    assert samestep("diff", str(left.path), str(right.path)) == 2
    assert "line 1 holds no figures of a step" in capsys.readouterr().err
    right.metrics_file.unlink()
    assert samestep("diff", str(left.path), str(right.path)) == 2
    assert "the run has taken no step yet" in capsys.readouterr().err
    assert samestep("diff", str(left.path), str(tmp_path / "none")) == 2
    assert "no such run" in capsys.readouterr().err
