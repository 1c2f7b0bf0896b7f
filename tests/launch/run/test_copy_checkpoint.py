"""`--from`: a run that begins with a checkpoint of another run."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints.manifest import read_manifest
from launch.checkpoints.publish import publish
from launch.checkpoints.scan import newest_valid
from launch.errors import CheckpointError, ConfigError
from launch.planning.step_plan import StreamOffset
from launch.run.continuation import continue_run
from launch.run.directory import RunDirectory
from launch.run.request_files import copy_checkpoint, write_request
from tests.helpers.attempts import BATCH, attempt, planned, recipe_of
from tests.helpers.checkpoints import ADAPTER, STATES, change_one_bit, names, write_aside

COPY = shutil.copyfile


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "mine")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint of another run: step 10 of batches of 8."""
    other = RunDirectory(tmp_path / "runs" / "other")
    attempt(other, recipe_of(), save=10)
    return other.checkpoint(10)


def test_a_run_begins_with_a_verified_copy_of_another_runs_checkpoint(run: RunDirectory, other: Path) -> None:
    published = read_manifest(other)
    plan = attempt(run, recipe_of(), source=other)
    assert (plan.begin, plan.started_from) == (StreamOffset(), str(other))
    newest, passed_over = newest_valid(run.path)
    assert newest is not None
    assert (newest.step, passed_over) == (10, [])
    assert newest.metadata == {**published["facts"], "copied_from": str(other)}
    copied = read_manifest(run.checkpoint(10), verify=True)
    assert copied["files"] == published["files"]
    assert not (run.checkpoint(10) / ADAPTER).samefile(other / ADAPTER)
    assert names(run.path) == {"recipe.yaml", "plan.json", "checkpoint-10"}
    assert read_manifest(other, verify=True) == published


def test_repeats_of_the_command_with_and_without_from_go_on(run: RunDirectory, other: Path) -> None:
    first = attempt(run, recipe_of(), source=other)
    assert attempt(run, recipe_of(), source=other) == first
    assert attempt(run, recipe_of(), save=12) == first
    shutil.rmtree(other)  # no longer needed
    assert continue_run(run, recipe_of(), (), other).source is None
    assert attempt(run, recipe_of(), source=other) == first
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("repeated", [True, False], ids=["with --from", "without"])
def test_a_run_killed_before_its_first_checkpoint_was_copied_copies_it_then(
    repeated: bool, run: RunDirectory, other: Path
) -> None:
    """With another batch size: from nothing, such a plan would begin in the middle of the stream."""
    changed = recipe_of(4, "training.learning_rate=0.5")
    first = continue_run(run, changed, (BATCH, "training.learning_rate"), other)
    assert (first.begin, first.source) == (StreamOffset(10, 80), other)
    write_request(run, changed, planned(changed, first))
    again = continue_run(run, changed, (), other if repeated else None)
    assert again == first


def test_another_source_takes_over_a_run_without_a_step_but_not_what_was_allowed_to_the_first(
    run: RunDirectory, other: Path, tmp_path: Path
) -> None:
    third = RunDirectory(tmp_path / "runs" / "third")
    attempt(third, recipe_of(), save=7)
    changed = recipe_of(8, "training.learning_rate=0.5")
    write_request(
        run, changed, planned(changed, continue_run(run, changed, ("training.learning_rate",), other))
    )
    with pytest.raises(ConfigError, match=r"checkpoint-7: was begun otherwise"):
        continue_run(run, changed, (), third.checkpoint(7))
    taken = continue_run(run, changed, ("training.learning_rate",), third.checkpoint(7))
    assert taken.started_from == str(third.checkpoint(7))


def test_a_run_that_began_otherwise_is_refused_another_source(
    run: RunDirectory, other: Path, tmp_path: Path
) -> None:
    third = RunDirectory(tmp_path / "runs" / "third")
    attempt(third, recipe_of(), save=7)
    attempt(run, recipe_of(), source=other)
    with pytest.raises(
        ConfigError, match=rf"--from: the run mine began with {other}, not with .*checkpoint-7"
    ):
        continue_run(run, recipe_of(), (), third.checkpoint(7))
    with pytest.raises(ConfigError, match=r"--from: the run third began with nothing"):
        continue_run(third, recipe_of(), (), other)
    shutil.rmtree(third.checkpoint(7))
    third.adapter.mkdir()  # done, its checkpoints thrown away
    with pytest.raises(ConfigError, match=r"--from: the run third began with nothing"):
        continue_run(third, recipe_of(), (), other)


def test_a_source_with_another_recipe_is_refused_unless_allowed(run: RunDirectory, other: Path) -> None:
    changed = recipe_of(4, "training.learning_rate=0.5")
    with pytest.raises(ConfigError) as caught:
        continue_run(run, changed, (BATCH,), other)
    assert caught.value.problems == [
        f"training.learning_rate: the run has {recipe_of().training.learning_rate}, the recipe 0.5; "
        "give the run's value, or --allow training.learning_rate",
        f"{other}: was begun otherwise (values that differ: 1); begin with another checkpoint, or from nothing",
    ]
    allowed = continue_run(run, changed, (BATCH, "training.learning_rate"), other)
    assert {change.key for change in allowed.changed} == {BATCH, "training.learning_rate"}
    with pytest.raises(ConfigError, match="which no --allow changes"):
        continue_run(run, recipe_of(8, "lora.r=4"), ("lora.r",), other)


def test_a_source_that_went_on_with_another_batch_size_hands_its_arithmetic_on(
    run: RunDirectory, tmp_path: Path
) -> None:
    third = RunDirectory(tmp_path / "runs" / "third")
    attempt(third, recipe_of(8), save=5)
    attempt(third, recipe_of(4), BATCH, save=9)
    assert continue_run(run, recipe_of(4), (), third.checkpoint(9)).begin == StreamOffset(5, 40)
    assert continue_run(run, recipe_of(2), (BATCH,), third.checkpoint(9)).begin == StreamOffset(9, 56)


def test_a_source_is_the_same_by_whatever_way_it_is_named(
    run: RunDirectory, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run, recipe_of(), source=other)
    (tmp_path / "link").symlink_to(other.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for way in ("runs/other", "link", "runs/../link", "~/link"):
        found = continue_run(run, recipe_of(), (), Path(way, "checkpoint-10"))
        assert found.started_from == str(other)


def _of_another_kind(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _facts_missing(folder: Path) -> None:
    manifest = read_manifest(folder)
    run = RunDirectory(folder.parent)
    shutil.rmtree(folder)
    publish(write_aside(run.path, 10), folder, {"step": manifest["facts"]["step"], "recipe": "unknown"})


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "--from: no such folder"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "--from: no such folder"),
    "bit-flipped": (lambda folder: change_one_bit(folder / ADAPTER), "has another content"),
    "incomplete": (lambda folder: (folder / STATES).unlink(), "is missing"),
    "with a foreign file": (lambda folder: (folder / "more").write_text(""), "was not published"),
    "unpublished": (lambda folder: (folder / "manifest.json").unlink(), "no checkpoint of samestep"),
    "of another kind": (_of_another_kind, "no checkpoint of samestep"),
    "of another version": (
        _facts_missing,
        r"\(begin, dataset_fingerprint, global_batch_size, recipe, samples_consumed\)",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_source_that_is_not_whole_is_refused_and_nothing_is_written(
    spoil: Callable[[Path], object], words: str, run: RunDirectory, other: Path
) -> None:
    spoil(other)
    with pytest.raises(CheckpointError, match=words) as caught:
        continue_run(run, recipe_of(), (), other)
    assert caught.value.exit_status == 2
    assert not run.path.exists()


# copying


def test_a_run_with_checkpoints_takes_no_copy(run: RunDirectory, other: Path) -> None:
    attempt(run, recipe_of(), save=3)
    copy_checkpoint(other, run)
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-3"]


def test_a_copy_that_was_cut_short_is_made_anew(run: RunDirectory, other: Path) -> None:
    cut = run.path / "checkpoint-10.partial"
    (cut / "rank states").mkdir(parents=True)
    (cut / "rank states" / "9.json").write_text("of a killed copy")
    copy_checkpoint(other, run)
    assert names(run.path) == {"checkpoint-10"}
    assert read_manifest(run.checkpoint(10), verify=True)["files"] == read_manifest(other)["files"]


def test_a_checkpoint_is_copied_from_a_folder_of_any_name(run: RunDirectory, other: Path) -> None:
    best = other.rename(other.with_name("best so far"))
    attempt(run, recipe_of(), source=best)
    assert names(run.path) == {"recipe.yaml", "plan.json", "checkpoint-10"}


def _flipping(source: Path, target: Path) -> None:
    COPY(source, target)
    if target.name == ADAPTER:
        change_one_bit(target)


def _vanishing(source: Path, target: Path) -> None:
    shutil.rmtree(source.parents[1] if source.parent.name == "rank states" else source.parent)
    raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))


def _on_a_full_disk(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:10])
    raise OSError(errno.ENOSPC, "No space left on device", str(target))


def _replaced(source: Path, target: Path) -> None:
    """Another attempt of the source's run publishes the same step anew, with other content."""
    folder = source.parents[1] if source.parent.name == "rank states" else source.parent
    facts = read_manifest(folder)["facts"]
    if facts.get("again") is None:
        shutil.rmtree(folder)
        publish(write_aside(folder.parent, 10), folder, {**facts, "again": True})
    COPY(source, target)


@pytest.mark.parametrize(
    ("copy", "error", "words"),
    [
        (_flipping, CheckpointError, "has another content"),
        (_vanishing, CheckpointError, "went away while it was copied"),
        (_on_a_full_disk, OSError, "No space left"),
        (_replaced, CheckpointError, "another checkpoint took its place"),
    ],
)
def test_a_copy_that_is_not_what_was_published_never_counts(
    copy: Callable[[Path, Path], None],
    error: type[Exception],
    words: str,
    run: RunDirectory,
    other: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published: list[Any] = []
    monkeypatch.setattr("launch.run.request_files.shutil.copyfile", copy)
    monkeypatch.setattr("launch.run.request_files.publish", lambda *given: published.append(given))
    with pytest.raises(error, match=words):
        copy_checkpoint(other, run)
    assert published == []
    assert list(run.path.iterdir()) == []
