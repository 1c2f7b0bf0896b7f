"""What a run's folder no longer tells is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.audit import restored
from launch.errors import ConfigError
from launch.run.directory import RunDirectory


def test_a_step_from_before_a_change_of_the_plan_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "grown")
    monkeypatch.setattr(restored, "read_plan", lambda _: SimpleNamespace(begin=SimpleNamespace(step=4)))
    with pytest.raises(ConfigError, match="--step: step 4 of grown was taken with an earlier plan"):
        restored.refuse_steps_of_another_plan(run, 4, "--step")
    restored.refuse_steps_of_another_plan(run, 5, "--step")


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
