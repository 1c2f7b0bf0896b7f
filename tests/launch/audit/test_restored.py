"""What a run's folder no longer tells is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.audit import restored
from launch.errors import ConfigError
from launch.local.planned_run import RunRequest
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory
from launch.run.lock import hold_lock
from launch.subprocesses import ChildError, Ended
from tests.helpers.attempts import attempt, recipe_of


def test_a_step_is_refused_where_the_checkpoint_is_gone_at_which_its_plan_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "grown")
    plan = SimpleNamespace(begin=SimpleNamespace(step=4), started_from="")
    monkeypatch.setattr(restored, "read_plan", lambda _: plan)
    checkpoints = [SimpleNamespace(valid=True, step=2), SimpleNamespace(valid=False, step=4)]
    monkeypatch.setattr(restored, "scan_checkpoints", lambda _: checkpoints)
    with pytest.raises(ConfigError, match="the checkpoint of step 4 is gone"):
        restored._checkpoint_before(run, 6)
    checkpoints[1].valid = True
    newest = restored._checkpoint_before(run, 6)
    assert newest is not None
    assert newest.step == 4


def test_copies_that_killed_processes_left_are_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("left", "used", "young", "unlocked", "elsewhere")
    left, used, young, unlocked, elsewhere = (tmp_path / f".replay-mine-{name}" for name in names)
    other, empty = tmp_path / ".replay-other-left", tmp_path / ".replay-mine-empty"
    for folder in (left, used, young, unlocked, other):
        (folder / "mine").mkdir(parents=True)
    for folder in (left, young, other):
        (folder / ".lock").touch()
    empty.mkdir()
    elsewhere.symlink_to(other)
    for folder in (left, unlocked, empty, other):
        os.utime(folder, (0, 0))
    monkeypatch.setattr(restored, "load_recipe", lambda _: None)
    monkeypatch.setattr(restored, "read_plan", lambda _: None)
    monkeypatch.setattr(restored, "_checkpoint_before", lambda *_: None)

    def refused(*_: object) -> None:
        raise ConfigError("no recipe")

    monkeypatch.setattr(restored, "_copy_until", refused)
    request = RunRequest(recipe="", runs_dir=tmp_path)
    with hold_lock(used):
        os.utime(used, (0, 0))
        with (
            pytest.raises(ConfigError, match="no recipe"),
            restored.restored(RunDirectory(tmp_path / "mine"), 4, request),
        ):
            pass
    assert {*tmp_path.glob(".replay-*")} == {used, young, unlocked, elsewhere, other}
    assert (other / "mine").is_dir()


def test_only_the_copy_of_a_run_in_a_folder_of_its_own_is_one(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / ".replay-mine-x1" / "mine").is_copy
    for place in ("mine", ".replay-test/mine", ".replay-other-x1/mine"):
        assert not RunDirectory(tmp_path / place).is_copy


def test_a_child_that_is_ended_is_named_by_the_users_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restored, "write_request", lambda *_: None)
    monkeypatch.setattr(restored, "trainer_command", lambda *_: [])
    monkeypatch.setattr(restored, "child_environment", lambda _: {})
    monkeypatch.setattr(restored, "wait_for", lambda *_: Ended(-15))
    planned = SimpleNamespace(plan=None, recipe=None)
    copy = SimpleNamespace(planned=planned, run=RunDirectory(tmp_path / "mine"))
    with pytest.raises(
        ChildError, match=r"^`samestep blame mine`: was ended by SIGTERM; the same command begins"
    ):
        restored.call_here(copy, "blame mine", "trainer.audit.blame", [])  # type: ignore[arg-type]


def test_the_copy_of_an_older_run_s_recipe_says_what_that_version_did(tmp_path: Path) -> None:
    run, copy = RunDirectory(tmp_path / "mine"), RunDirectory(tmp_path / "copy" / "mine")
    attempt(run, recipe_of(8, "batch.prefix_sharing=false"))
    lines = run.recipe_file.read_text().splitlines(keepends=True)
    run.recipe_file.write_text("".join(line for line in lines if "prefix_sharing" not in line))
    copy.path.parent.mkdir()
    restored._copy_until(run, copy, None)
    assert not copy.plan_file.exists()
    assert not load_recipe(copy.recipe_file).batch.prefix_sharing
