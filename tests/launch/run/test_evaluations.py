"""The best evaluation and the early end follow from evaluations.jsonl and the checkpoints that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.recipe.loading import find_recipe, load_recipe, recipe_from_dict
from launch.run.directory import RunDirectory
from launch.run.evaluations import (
    Evaluation,
    best_checkpoint,
    best_of,
    early_end,
    is_best,
    read_evaluations,
    stopped_improving,
)


def evaluations(*losses: float) -> list[Evaluation]:
    return [Evaluation(10 * (n + 1), loss, -loss) for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "patience", "end"),
    [
        ((3, 2, 1), 1, None),
        ((3, 2, 2), 1, 30),  # as good is no gain
        ((3, 4, 2, 2.5, 2.4), 2, 50),
        ((3, 4, 2, 2.5, 1.9, 2, 2, 2), 3, 80),
        ((3, 4, 4, 4), 0, None),
        ((), 1, None),
        ((3, 4, 4, 1), 2, 30),  # what came later does not undo it
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_gain(
    losses: tuple[float, ...], patience: int, end: int | None
) -> None:
    assert stopped_improving(evaluations(*losses), patience) == end


def test_the_first_of_equal_evaluations_is_the_best() -> None:
    found = evaluations(3, 1, 2, 1)
    best = best_of(found)
    assert best is not None
    assert best.step == 20
    assert [each.step for each in found if is_best(found, each.step)] == [10, 20]
    assert best_of([]) is None
    assert not is_best(found, 25)


def test_lines_are_read_by_metric_and_what_is_no_line_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.jsonl"
    lines = [
        {"step": 20, "loss": 2.0, "accuracy": 40.0},
        {"step": 10, "loss": 3.0},
        {"step": "x", "loss": 1.0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + '\n[1]\n{"step": 30, "lo')
    assert [(each.step, each.value) for each in read_evaluations(file, "eval_loss")] == [(10, 3.0), (20, 2.0)]
    assert [(each.step, each.gain) for each in read_evaluations(file, "accuracy")] == [(20, 40.0)]
    assert read_evaluations(tmp_path / "nothing", "accuracy") == []


def test_the_best_is_one_whose_checkpoint_is_there(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    recipe = load_recipe(
        find_recipe("embedded"), ["checkpoint.keep_best=eval_loss", "evaluation.early_stop=2"]
    )
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5}
    run.evaluations_file.write_text(
        "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items())
    )
    for step in (30, 40):
        run.checkpoint(step).mkdir()
    (run.checkpoint(30) / "manifest.json").touch()
    best = best_checkpoint(run, recipe)
    assert best is not None
    assert best.step == 30  # 40 was never published
    (run.checkpoint(40) / "manifest.json").touch()
    best = best_checkpoint(run, recipe)
    assert best is not None
    assert best.step == 40
    assert early_end(run, recipe) == 40
    assert best_checkpoint(run, load_recipe(find_recipe("embedded"))) is None
    assert early_end(run, load_recipe(find_recipe("embedded"))) is None


def test_the_best_accuracy_needs_answers() -> None:
    values = load_recipe(find_recipe("embedded")).model_dump(mode="json")
    values["checkpoint"]["keep_best"] = "accuracy"
    with pytest.raises(
        ConfigError, match=r"checkpoint.keep_best: accuracy is not measured .*evaluation.answers"
    ):
        recipe_from_dict(values)
    values["evaluation"]["answers"] = 8
    assert recipe_from_dict(values).checkpoint.keep_best == "accuracy"
