"""What the folder of a run tells of a step that it took before something changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.audit import recorded
from launch.errors import ConfigError
from launch.run.directory import RunDirectory
from launch.run.request_files import keep_plan
from tests.helpers.attempts import attempt, recipe_of


def test_a_step_from_before_a_change_of_the_plan_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "grown")
    monkeypatch.setattr(recorded, "read_plan", lambda _: SimpleNamespace(begin=SimpleNamespace(step=4)))
    with pytest.raises(ConfigError, match="--step: step 4 of grown was taken with an earlier plan"):
        recorded.refuse_steps_of_another_plan(run, 4, "--step")
    recorded.refuse_steps_of_another_plan(run, 5, "--step")


def test_what_was_allowed_to_change_after_a_step_is_what_the_next_checkpoint_records(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "mine")
    attempt(run, recipe_of(), save=2)
    plan = attempt(run, recipe_of(8, "training.learning_rate=9e-5"), "training.learning_rate", save=5)
    (change,) = recorded.changes_since(run, 2)
    assert (change.key, change.new) == ("training.learning_rate", 9e-5)
    assert recorded.changed_since(run, 2) == (f"training.learning_rate was {change.old} and is 9e-05",)
    assert recorded.changes_since(run, 3) == recorded.changes_since(run, 6) == []
    recorded.refuse_steps_of_another_plan(run, 2, "--step")
    keep_plan(run, replace(plan, dataset_fingerprint="other"))
    with pytest.raises(ConfigError, match=r"step 5 of mine was taken before a change .*data\.train\.rows"):
        recorded.refuse_steps_of_another_plan(run, 5, "--step")
    recorded.refuse_steps_of_another_plan(run, 6, "--step")


def test_what_a_checkpoint_does_not_record_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "mine")
    monkeypatch.setattr("tests.helpers.attempts.altering_values", lambda _: None)
    attempt(run, recipe_of(), save=2)
    assert recorded.changes_since(run, 2) == []
