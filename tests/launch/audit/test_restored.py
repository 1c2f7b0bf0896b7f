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
