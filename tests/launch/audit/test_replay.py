"""What a replay leaves out of the run that it takes again, and how an interrupted one ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.audit import replay as replays
from launch.audit.diff import Parting
from launch.audit.replay import Replay
from launch.audit.restored import QUIET
from launch.errors import ConfigError, RunError
from launch.local.planned_run import RunRequest
from launch.recipe.fingerprint import altering_values
from launch.run.directory import RunDirectory
from tests.helpers.indexes import embedded_recipe


def test_a_replay_uploads_and_tracks_nothing_and_alters_no_number() -> None:
    shown = (
        "hub.push=true",
        "hub.repo_id=me/it",
        "hub.every_checkpoints=1",
        "tracking.report_to=[trackio, wandb]",
    )
    recipe, quiet = embedded_recipe(*shown), embedded_recipe(*shown, *QUIET)
    assert (recipe.hub.push, recipe.tracking.trackers) == (True, ("trackio", "wandb"))
    assert (quiet.hub.push, quiet.tracking.trackers) == (False, ())
    assert altering_values(quiet) == altering_values(recipe)


@pytest.mark.parametrize(("kind", "error"), [("STOPPED", KeyboardInterrupt), ("DONE", RunError)])
def test_a_replay_that_is_interrupted_is_no_failure(
    kind: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its training a Ctrl-C makes a stop in good order, before the steps are taken."""
    copy = RunDirectory(tmp_path / "copy")

    @contextmanager
    def restored(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(run=copy, planned=SimpleNamespace(plan=None), request=None, begin=None)

    monkeypatch.setattr(replays, "read_plan", lambda _: None)
    monkeypatch.setattr(replays, "restored", restored)
    recorded = RunDirectory(tmp_path / "mine").metrics_file
    recorded.parent.mkdir()
    recorded.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 6)))
    monkeypatch.setattr(replays, "execute_with_oom_retry", lambda *_: SimpleNamespace(kind=kind))
    with pytest.raises(error):
        replays.replay(RunDirectory(tmp_path / "mine"), 3, 4, RunRequest(recipe="", runs_dir=tmp_path))


def test_steps_without_recorded_figures_are_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "read_plan", lambda _: None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 5, "loss": 1.0}\n')
    with pytest.raises(
        ConfigError, match=r"--steps: .*metrics\.jsonl has no figures of step 4; name other steps"
    ):
        replays.replay(RunDirectory(tmp_path), 3, 5, RunRequest(recipe="", runs_dir=tmp_path))


@pytest.mark.parametrize(("last", "words"), [(0, "has no step"), (4, "22:23 is not among the steps 1 to 4")])
def test_steps_that_a_run_has_not_taken_are_refused(last: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replays.refuse_steps_not_taken((22, 23), last)


def test_steps_from_before_an_allowed_change_say_what_changed_and_blame_no_machine() -> None:
    parting = Parting("samples", 2, "a", "b", None, 0.0)
    result = Replay(
        2, 3, None, "single", 1, 1e-6, parting, False, 0.1, (), (), ("data.train.rows was a and is b",)
    )
    (note,) = result.notes()
    assert note.endswith("so they cannot come out as they were: data.train.rows was a and is b")
    assert "look at the machines" in next(replace(result, changed=()).notes())
    assert [*replace(result, parting=None).notes()] == []
