"""Metrics of one answer: against values worked out by hand, and functions of a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError, RunError
from launch.recipe.contradictions import METRIC_NAMES
from launch.recipe.loading import dump_recipe, load_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import recipe_values
from trainer.evaluation.metric_functions import (
    METRICS,
    OF_TEXT,
    RELAXED,
    Metrics,
    anls,
    exact_match,
    figures,
    load_metrics,
    relaxed_accuracy,
    token_f1,
)


@pytest.mark.parametrize(
    ("score", "prediction", "labels", "expected"),
    [
        (relaxed_accuracy, "10.4", ["10", "99"], 1),
        (relaxed_accuracy, "99", ["10", "99"], 0),  # the first label alone counts
        (exact_match, "The Blue one.", ["red", "blue  one"], 1),
        (exact_match, "blue", ["blue one"], 0),
        (token_f1, "a blue bar", ["blue bar chart"], 2 * 2 / (2 + 3)),
        (token_f1, "green", ["blue", "very green"], 2 / 3),
        (token_f1, "", ["blue"], 0),
        (anls, "Paris", ["paris"], 1),
        (anls, "Pari", ["Paris"], 0.8),
        (anls, "kitten", ["sitting"], 1 - 3 / 7),
        (anls, "ab", ["abcd"], 0),  # half of the length is too far
        (anls, "x", ["y", "xy z"], 0),
    ],
)
def test_a_score_is_what_its_rule_says(
    score: Any, prediction: str, labels: list[str], expected: float
) -> None:
    assert score(prediction, labels) == pytest.approx(expected)


def test_the_first_metric_says_what_is_correct_and_all_are_summed_up() -> None:
    metrics = Metrics({"anls": anls, "exact_match": exact_match})
    assert metrics.is_correct("Pari", ["Paris"])
    predictions = [
        {"base": {"scores": metrics.score(text, ["Paris"])}} for text in ("Pari", "Paris", "x", "Paris")
    ]
    found = figures(predictions, ["base"], metrics)
    assert found["anls"]["base"]["percent"] == pytest.approx(100 * 2.8 / 4)
    assert found["exact_match"]["base"] == {"percent": 50.0, "standard_error": 25.0, "count": 4}
    assert set(METRICS) == set(METRIC_NAMES)


def _recipe(world: Path, folder: Path, *metrics: str) -> Recipe:
    values = recipe_values(world)
    values["evaluation"] = {"metrics": list(metrics)}
    (folder / "recipe.yaml").write_text(dump_recipe(recipe_from_dict(values)))
    return load_recipe(folder / "recipe.yaml")


def test_a_function_of_the_users_own_is_found_beside_the_recipe_and_said(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scores.py").write_text(
        "from lies_beside_scores import MOST\n"
        "def length(prediction, labels):\n    return min(len(prediction), MOST) / 10\n"
        "def wrong(prediction, labels):\n    return 7\n"
        "def fails(prediction, labels):\n    return 1 / 0\n"
        "def words(prediction, labels):\n    return '0.5'\n"
        "def nothing(prediction, labels):\n    pass\n"
        "def leaves(prediction, labels):\n    raise SystemExit(0)\n"
    )
    (tmp_path / "lies_beside_scores.py").write_text("MOST = 10\n")
    caplog.set_level("INFO", "trainer")
    recipe = _recipe(world, tmp_path, "exact_match", "scores:length")
    copy = tmp_path / "runs" / "recipe.yaml"  # a run's own copy, from which it is evaluated
    copy.parent.mkdir()
    copy.write_text(dump_recipe(recipe))
    metrics = load_metrics(load_recipe(copy), has_kinds=True)
    assert metrics.score("seven", ["x"]) == {"exact_match": 0.0, "scores:length": 0.5}
    assert f"scores:length is the function length of {tmp_path / 'scores.py'}" in caplog.text
    for name, reason in (
        ("wrong", "makes 7 of the answer"),
        ("words", "makes '0.5' of the answer .* it must return a number"),
        ("nothing", "makes None of the answer"),
        ("leaves", "fails on the answer .*SystemExit"),
        ("fails", "fails on the answer .*ZeroDivision"),
    ):
        with pytest.raises(RunError, match=reason):
            load_metrics(_recipe(world, tmp_path, f"scores:{name}"), has_kinds=True).score("x", ["y"])


def test_metrics_that_cannot_be_are_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: 'bleu' is not relaxed_accuracy"):
        _recipe(world, tmp_path, "bleu")
    for name, reason in (
        ("gone:score", "there is no file gone.py"),
        ("broken:score", "broken.py cannot be loaded .*nothing_of_that_name"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_metrics(_recipe(world, tmp_path, name), has_kinds=True)
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(ConfigError, match=r"leaves\.py cannot be loaded .SystemExit"):
        load_metrics(_recipe(world, tmp_path, "leaves:score"), has_kinds=True)
    (tmp_path / "broken.py").write_text("")
    with pytest.raises(ConfigError, match="has no function score"):
        load_metrics(_recipe(world, tmp_path, "broken:score"), has_kinds=True)


def test_the_metric_follows_the_data_where_the_recipe_does_not_say(world: Path) -> None:
    recipe = recipe_from_dict(recipe_values(world))
    assert load_metrics(recipe, has_kinds=True) is RELAXED
    assert load_metrics(recipe, has_kinds=False) is OF_TEXT
