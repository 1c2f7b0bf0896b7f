"""What is refused before a step's losses are computed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.audit import blame, deep
from launch.audit.blame import Blame, StepWithout
from launch.audit.recorded import read_plan
from launch.cli.tables import show_blame
from launch.errors import ConfigError
from launch.inputs.dataset_index import Index
from launch.planning.run_steps import stream_of
from launch.recipe.loading import load_recipe
from launch.run.blamed import BlamedSample
from launch.run.directory import RunDirectory
from tests.helpers.indexes import make_index
from tests.helpers.launcher import samestep

OLD_RUN = Path(__file__).parents[2] / "data" / "run_of_c54213f" / "straight"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """6 steps of 8 samples."""
    return RunDirectory(Path(shutil.copytree(OLD_RUN, tmp_path / "run")))


def index_of(fingerprint: str) -> Index:
    return replace(make_index(60), fingerprint=fingerprint)


def prepared_meanwhile(
    monkeypatch: pytest.MonkeyPatch, run: RunDirectory, fingerprint: str, *indexes: Index | None
) -> list[str]:
    """Stand in for planning and training. `indexes`: what each look finds; the answer lists what would be trained."""
    looks, trained = iter(indexes), []
    planned = SimpleNamespace(
        recipe=load_recipe(run.recipe_file), plan=replace(read_plan(run), dataset_fingerprint=fingerprint)
    )

    @contextmanager
    def restored(*_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(run=run, planned=planned)

    def call_here(copy: object, what: str, module: str, arguments: list[str]) -> None:
        trained.append(arguments[arguments.index("--without") + 1])
        raise ConfigError("as far as training")

    monkeypatch.setattr(blame, "read_index", lambda _: next(looks))
    monkeypatch.setattr(blame, "restored", restored)
    monkeypatch.setattr(blame, "call_here", call_here)
    return trained


def test_the_samples_with_the_largest_losses_are_shown_and_the_others_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = tuple(BlamedSample(row, 1.0, 0.1, 3, 90, "why?", "so") for row in range(500, 512))
    show_blame(Blame(2, "checkpoint-1", 1.2, 1.2, 1e-6, samples))
    said = capsys.readouterr().out
    assert "509" in said
    assert "510" not in said
    assert "2 samples more stand in the file" in said


def test_a_step_from_before_a_change_that_was_allowed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    sample = BlamedSample(3, 1.0, 1.2, 3, 90, "why?", "so")
    steps = (StepWithout(2, "loss", 1.2, 1.1),)
    changed = ("training.learning_rate was 0.0002 and is 9e-05",)
    show_blame(Blame(2, "checkpoint-1", 1.2, 1.2, 1e-6, (sample,), (3,), steps, changed))
    words = " ".join(capsys.readouterr().out.split())
    assert "before a change that was allowed" in words
    assert changed[0] in words


@pytest.mark.parametrize("other_data", [False, True])
def test_rows_of_data_that_is_prepared_only_now_are_checked_before_training(
    run: RunDirectory,
    other_data: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = read_plan(run)
    now = "a" * 64 if other_data else plan.dataset_fingerprint
    before = index_of(now) if other_data else None  # either way nothing that the run's own plan belongs to
    trained = prepared_meanwhile(monkeypatch, run, now, *[before, index_of(now)] * 2)
    assert samestep("blame", str(run.path), "--step", "6", "--without", "999999999") == 2
    assert "row 999999999 is not among the samples of step 6" in capsys.readouterr().err
    assert trained == []
    stream = stream_of(load_recipe(run.recipe_file), replace(plan, dataset_fingerprint=now))
    row = str(stream.samples(5)[0])
    assert samestep("blame", str(run.path), "--step", "6", "--without", row) == 2
    assert trained == [row]


def test_data_that_goes_while_the_step_is_planned_is_refused(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = prepared_meanwhile(monkeypatch, run, read_plan(run).dataset_fingerprint, None, None)
    assert samestep("blame", str(run.path), "--step", "6", "--without", "1") == 2
    assert "its prepared data was changed meanwhile; run `samestep prepare" in capsys.readouterr().err
    assert trained == []


def test_blame_and_diff_refuse_a_step_that_another_plan_took(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared_meanwhile(monkeypatch, run, read_plan(run).dataset_fingerprint)
    values = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps(values | {"begin": {"step": 4, "sample": 16}}))
    assert samestep("blame", str(run.path), "--step", "4") == 2
    assert "--step: step 4 of run was taken with an earlier plan" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--deep: step 4 of run was taken with an earlier plan"):
        deep._first_micro_batch(run, 4)
