"""One process: where a run goes on, what it may change on the way, and what it does when it cannot save."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoints.manifest import checksum_of, read_manifest
from launch.inputs.dataset_index import Index, read_index
from launch.inputs.identity import DATA_PARTS, MODEL_PARTS
from launch.inputs.model_files import old_base_identity
from launch.planning.run_steps import step_plan
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory, clear_markers, read_marker, request_stop
from tests.helpers.distributed.recorded import (
    adapter_of,
    assert_the_same_to_the_byte,
    evaluations_of,
    metrics_of,
    run_of,
    sha256_of,
    write_recipe,
)
from trainer.checkpoint.saver import Saver
from trainer.loop.trainer import PlannedTrainer
from trainer.metrics_log import samples_digest
from trainer.train import main

CADENCE: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 6},
    "checkpoint": {"every_steps": 2, "keep": 5},
    "evaluation": {"every_steps": 2, "max_samples": 4},
}


def _train(recipe: Path, name: str, *more: str) -> int:
    return main([str(recipe), "--runs-dir", str(recipe.parent), "--name", name, *more])


def _recipe(world: Path, file: Path, **changes: dict[str, Any]) -> Path:
    sections = {key: CADENCE.get(key, {}) | changes.get(key, {}) for key in CADENCE | changes}
    return write_recipe(world, file, "plain", **sections)


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run of 6 steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("resume")
    assert _train(_recipe(world, folder / "recipe.yaml"), "run") == 0
    return RunDirectory(folder / "run")


def _copy(done: RunDirectory, folder: Path, *without: int) -> RunDirectory:
    """A copy of the run as it was before the checkpoints `without` were published."""
    shutil.copytree(done.path.parent, folder, dirs_exist_ok=True)
    run = RunDirectory(folder / done.name)
    for step in without:
        shutil.rmtree(run.checkpoint(step))
    shutil.rmtree(run.adapter)
    return run


def index_of(run: RunDirectory) -> Index:
    index = read_index(load_recipe(run.recipe_file))
    assert index is not None
    return index


def _again(run: RunDirectory, *more: str) -> int:
    return _train(run.path.parent / "recipe.yaml", run.name, *more)


# what a checkpoint says, and what happens to damaged ones --------------------------------------------------


def test_a_checkpoint_says_what_it_is(done: RunDirectory) -> None:
    facts = run_of(done.path).facts(4)
    assert (facts["step"], facts["samples_consumed"], facts["world_size"]) == (4, 32, 1)
    assert facts["epoch"] == pytest.approx(32 / 60)
    assert (facts["strategy"], facts["form"]) == ("single", "portable")
    assert facts["recipe"]["lora.lora_dropout"] == 0.05
    assert facts["quantization"]["load_in_4bit"] is False
    assert facts["versions"]["torch"]
    for key in ("recipe_fingerprint", "dataset_fingerprint"):
        assert len(facts[key]) >= 40
    assert {part: len(digest) for part, digest in facts["identity"].items()} == {
        **dict.fromkeys(MODEL_PARTS, 32),
        **dict.fromkeys(DATA_PARTS, 64),
    }
    assert facts["identity"] == run_of(done.path).plan.identity
    manifest = read_manifest(done.checkpoint(4), verify=True)
    assert sorted(manifest["files"]) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: _truncate(folder / "optimizer.safetensors"),
    "bit-flipped": lambda folder: _flip(folder / "adapter_model.safetensors"),
    "missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "emptied": lambda folder: (folder / "adapter_config.json").write_text(""),
    "foreign": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
    "of another step": lambda folder: shutil.copyfile(
        folder.with_name("checkpoint-2") / "optimizer.safetensors", folder / "optimizer.safetensors"
    ),
    "without manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    damage: str, done: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _copy(done, tmp_path, 6)
    DAMAGE[damage](run.checkpoint(4))
    assert _again(run) == 0
    assert f"passed over: {run.checkpoint(4)}" in caplog.text
    assert "resuming at step 2 of 6" in caplog.text
    assert_the_same_to_the_byte(run.path, done.path)
    read_manifest(run.checkpoint(4), verify=True)  # written again


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    for step in (2, 4, 6):
        _flip(run.checkpoint(step) / "optimizer.safetensors")
    figures = run.metrics_file.read_bytes()
    assert _again(run) == 2
    assert (
        "every published checkpoint is damaged (checkpoint-6, checkpoint-4, checkpoint-2"
        in capsys.readouterr().err
    )
    assert run.metrics_file.read_bytes() == figures


def test_a_result_without_checkpoints_is_not_trained_anew(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    for folder in run.checkpoints():
        shutil.rmtree(folder)
    shutil.copytree(done.adapter, run.adapter, dirs_exist_ok=True)
    figures, result = run.metrics_file.read_bytes(), sha256_of(run.path)
    assert _again(run) == 0  # it is done
    clear_markers(run)  # an attempt that was killed has no marker either
    assert _again(run) == 2
    assert "the run has a result and no checkpoint to go on from" in capsys.readouterr().err
    assert run.metrics_file.read_bytes() == figures
    assert sha256_of(run.path) == result


def test_a_half_written_checkpoint_is_named_and_removed(
    done: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _copy(done, tmp_path, 6)
    half = run.path / "checkpoint-5.partial"
    half.mkdir()
    (half / "optimizer.safetensors").write_bytes(b"half")
    assert _again(run) == 0
    assert f"{half}: removed, it was never published" in caplog.text
    assert not half.exists()
    assert_the_same_to_the_byte(run.path, done.path)


# saving ----------------------------------------------------------------------------------------------------


def test_the_first_step_is_saved_when_asked_and_a_save_file_saves_at_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(world, tmp_path / "recipe.yaml", checkpoint={"every_steps": 100, "first_step": True})
    run = RunDirectory(tmp_path / "run")
    training_step = PlannedTrainer.training_step

    def ask_in_step_3(self: PlannedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            run.save_file.touch()
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PlannedTrainer, "training_step", ask_in_step_3)
    assert _train(recipe, "run") == 0
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-1", "checkpoint-3", "checkpoint-6"]
    assert not run.save_file.exists()


def test_a_disk_that_is_full_in_the_middle_of_a_save_stops_the_run_and_leaves_the_last_good_checkpoint(
    done: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Really refused by the kernel: while a save goes on, no file may grow beyond what the adapter needs."""
    run = _copy(done, tmp_path, 4, 6)
    size = (run.checkpoint(2) / "adapter_model.safetensors").stat().st_size + 1000
    save = Saver._write

    def save_with_little_room(self: Saver, *args: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "_write", save_with_little_room)
        assert _again(run) == 1
    said = capsys.readouterr().err
    assert "make room or give permission; the same command goes on" in said
    assert "Traceback" not in said
    assert read_marker(run) is None
    assert [folder.name for folder in run.path.glob("checkpoint-*")] == ["checkpoint-2"]
    read_manifest(run.checkpoint(2), verify=True)
    assert _again(run) == 0
    assert_the_same_to_the_byte(run.path, done.path)


def test_a_run_directory_that_vanishes_stops_the_run_with_a_message(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(world, tmp_path / "recipe.yaml")
    training_step = PlannedTrainer.training_step

    def vanish_in_step_4(self: PlannedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3 and (tmp_path / "run").exists():
            self.saver.wait()  # of step 2
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PlannedTrainer, "training_step", vanish_in_step_4)
    assert _train(recipe, "run") == 1
    said = capsys.readouterr().err
    assert "metrics.jsonl: No such file or directory" in said or "checkpoint-4.partial: No such file" in said
    assert "Traceback" not in said
    read_manifest(tmp_path / "elsewhere" / "checkpoint-2", verify=True)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_becomes_read_only_stops_the_run_and_leaves_the_last_good_checkpoint(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _copy(done, tmp_path, 4, 6)

    def refuse(file: Path, values: dict[str, Any]) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))

    with monkeypatch.context() as patched:
        patched.setattr("trainer.loop.callbacks.append_line", refuse)
        assert _again(run) == 1
    said = capsys.readouterr().err
    assert "metrics.jsonl: Read-only file system; give permission to write" in said
    assert "Traceback" not in said
    read_manifest(run.checkpoint(2), verify=True)
    assert _again(run) == 0
    assert_the_same_to_the_byte(run.path, done.path)


# stopping --------------------------------------------------------------------------------------------------


def test_a_stop_during_an_evaluation_gives_it_up_and_the_next_attempt_makes_up_for_it(
    world: Path, done: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(world, tmp_path / "recipe.yaml", checkpoint={"every_steps": 100})
    run = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patched:
        loader = PlannedTrainer.get_eval_dataloader

        def ask_while_loading(self: PlannedTrainer, *args: Any) -> Any:
            request_stop(run, "time")
            return loader(self, *args)

        patched.setattr(PlannedTrainer, "get_eval_dataloader", ask_while_loading)
        assert _train(recipe, "run") == 0
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, marker.text) == ("STOPPED", "time: at step 2 of 6")
    assert [folder.name for folder in run.checkpoints()] == ["checkpoint-2"]
    assert not run.evaluations_file.exists()
    assert not run.adapter.exists()
    assert _train(recipe, "run") == 0
    assert_the_same_to_the_byte(run.path, done.path)


def test_a_stop_in_every_evaluation_still_ends_with_all_of_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the one that makes up for another, and in the last, which is due whatever the cadence."""
    cadence = {"training": {"max_steps": 5}, "checkpoint": {"every_steps": 100}}
    recipe = _recipe(world, tmp_path / "recipe.yaml", **cadence, batch={"micro_batch_tokens": 100_000})
    assert _train(recipe, "straight") == 0
    run = RunDirectory(tmp_path / "run")
    loader, asked, ends = PlannedTrainer.get_eval_dataloader, Counter[int](), list[str]()

    def ask_twice_at_each_step(self: PlannedTrainer, *args: Any) -> Any:
        asked[self.state.global_step] += 1
        if asked[self.state.global_step] <= 2:
            request_stop(run, "time")
        return loader(self, *args)

    monkeypatch.setattr(PlannedTrainer, "get_eval_dataloader", ask_twice_at_each_step)
    while not ends or ends[-1] != "DONE":
        assert len(ends) < 12
        assert _train(recipe, "run") == 0
        marker = read_marker(run)
        assert marker is not None
        ends.append(marker.text if marker.kind == "STOPPED" else marker.kind)
    assert ends == [f"time: at step {step} of 5" for step in (2, 2, 4, 4, 5, 5)] + ["DONE"]
    assert_the_same_to_the_byte(run.path, tmp_path / "straight")


def test_a_stop_that_was_asked_for_before_the_start_trains_nothing(
    done: RunDirectory, tmp_path: Path
) -> None:
    run = _copy(done, tmp_path, 6)
    run.stop_file.write_text("user\n")
    assert _again(run) == 0
    marker = read_marker(run)
    assert marker is not None
    assert (marker.kind, marker.text) == ("STOPPED", "user: at step 4 of 6")
    assert not run.stop_file.exists()
    assert _again(run) == 0
    assert_the_same_to_the_byte(run.path, done.path)


def test_a_stop_that_an_earlier_attempt_did_not_answer_is_removed(done: RunDirectory, tmp_path: Path) -> None:
    run = _copy(done, tmp_path, 6)
    run.stop_file.write_text("preempted\n")
    os.utime(run.stop_file, (0, 0))
    assert _again(run) == 0
    assert not run.stop_file.exists()
    assert_the_same_to_the_byte(run.path, done.path)


# changing a run on the way ---------------------------------------------------------------------------------


def test_a_finished_run_is_extended_and_says_what_becomes_of_the_learning_rate(
    world: Path,
    done: RunDirectory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = _copy(done, tmp_path)
    _recipe(world, tmp_path / "recipe.yaml", training={"max_steps": 9})
    assert _again(run) == 2
    said = capsys.readouterr().err
    assert "training.max_steps: the run has 6, the recipe 9" in said
    assert "--allow training.max_steps" in said
    assert _again(run, "--allow", "training.max_steps") == 0
    assert "a rate that had decayed rises again" in caplog.text
    assert "the learning rate goes on at" in caplog.text
    assert "where the checkpoint's schedule had 0: linear over 9 steps, at step 6" in caplog.text
    assert [line["step"] for line in metrics_of(run.path)] == list(range(1, 10))
    assert metrics_of(run.path)[:6] == metrics_of(done.path)
    rates = [line["learning_rate"] for line in metrics_of(run.path)]
    assert rates[5] < rates[6] > rates[7] > rates[8] > 0
    assert sha256_of(run.path) != sha256_of(done.path)


def test_another_global_batch_size_goes_on_at_the_same_place_of_the_stream(
    world: Path, done: RunDirectory, tmp_path: Path
) -> None:
    run = _copy(done, tmp_path, 6)
    _recipe(world, tmp_path / "recipe.yaml", batch={"global_batch_size": 4})
    assert _again(run, "--allow", "batch.global_batch_size") == 0
    straight, changed = run_of(done.path).plan, run_of(run.path).plan
    assert (changed.begin.step, changed.begin.sample) == (4, 32)
    assert straight.dataset_fingerprint == changed.dataset_fingerprint
    facts = run_of(run.path).facts(6)
    assert facts["samples_consumed"] == 40
    from launch.planning.step_plan import SampleStream
    from trainer.metrics_log import step_rows_digest

    rows = index_of(run).splits["train"].digests
    stream = (
        SampleStream(n=60, global_batch_size=8, seed=42, fingerprint=straight.dataset_fingerprint)
        .samples(4)
        .tolist()
    )
    digests = [line["samples_digest"] for line in metrics_of(run.path)][4:]
    assert digests == [step_rows_digest(rows[each] for each in half) for half in (stream[:4], stream[4:])]
    assert _again(run) == 0  # the same command again finds nothing to do, and refuses nothing


def test_a_run_begins_with_a_checkpoint_of_another(
    world: Path,
    done: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = _recipe(world, tmp_path / "recipe.yaml")
    source = done.checkpoint(4)
    assert _train(recipe, "same", "--from", str(source)) == 0
    assert sha256_of(tmp_path / "same") == sha256_of(done.path)
    assert [line["step"] for line in metrics_of(tmp_path / "same")] == [5, 6]
    assert run_of(tmp_path / "same").facts(6)["started_from"] == str(source)
    assert "has no whole line" not in caplog.text
    gentle = _recipe(world, tmp_path / "recipe.yaml", training={"learning_rate": 1e-4})
    assert _train(gentle, "other", "--from", str(source)) == 2
    assert "training.learning_rate: the run has 0.0002, the recipe 0.0001" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert _train(gentle, "other", "--from", str(source), "--allow", "training.learning_rate") == 0
    moved = adapter_of(tmp_path / "other")
    assert any((moved[name] != tensor).any() for name, tensor in adapter_of(done.path).items())
    assert [line["step"] for line in evaluations_of(tmp_path / "other")] == [4, 6]


@contextmanager
def edited(file: Path, old: str, new: str) -> Iterator[None]:
    """A file of the world that all tests share, changed for the block."""
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))
    try:
        yield
    finally:
        file.write_text(content)


def test_another_processor_behind_the_same_name_is_refused_and_may_be_allowed(
    world: Path,
    done: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = _copy(done, tmp_path, 6)
    before = run_of(done.path).facts(4)["identity"]["model.processor"]
    with edited(world / "base" / "processor_config.json", "0.48145466", "0.9"):
        assert _again(run) == 2
        said = capsys.readouterr().err
        assert f"model.processor: the run has '{before[:12]}', here it is '" in said
        assert "--allow model.processor" in said
        assert _again(run, "--allow", "model.content") == 0
        assert "the images become other numbers from now on" in caplog.text
        after = run_of(run.path).facts(6)["identity"]
        assert after["model.processor"] != before
        assert f"model.processor={after['model.processor'][:12]}" in run_of(run.path).plan.allowed
        losses = [line["loss"] for line in metrics_of(run.path)]
        undisturbed = [line["loss"] for line in metrics_of(done.path)]
        assert (losses[:4], losses[4] == undisturbed[4]) == (undisturbed[:4], False)
        marker = read_marker(run)
        assert marker is not None
        assert marker.kind == "DONE"
    with edited(world / "base" / "processor_config.json", "0.48145466", "0.8"):
        assert _again(run) == 2  # what was allowed was that other processor, not any


def test_a_plan_that_was_made_for_another_template_is_refused_before_it_is_taken_up(
    world: Path, done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path, 6)
    with edited(world / "base" / "chat_template.jinja", "{%- for message", "{#- edited -#}{%- for message"):
        assert main(["--run-dir", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert "model.chat_template: planned for '" in said
    assert "was made for other data or another base (parts that differ: 1)" in said


def _as_an_older_version_left_it(run: RunDirectory) -> None:
    """Without the identity by parts, and with samples named by their positions."""
    steps = step_plan(load_recipe(run.recipe_file), index_of(run), run_of(run.path).plan)
    plan = json.loads(run.plan_file.read_text())
    base = Path(load_recipe(run.recipe_file).model.name_or_path)
    for key in ("identity", "samples_digest"):
        del plan[key]
    run.plan_file.write_text(json.dumps(plan))
    for folder in run.checkpoints():
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["facts"]["identity"]
        manifest["facts"]["base_identity"] = old_base_identity(base)
        manifest["sha256"] = checksum_of(manifest["facts"], manifest["files"])
        (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [
        line | {"samples_digest": samples_digest(steps.samples(line["step"] - 1))}
        for line in metrics_of(run.path)
    ]
    run.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_run_of_an_older_version_goes_on_and_its_identity_is_recorded_from_then_on(
    world: Path, done: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, whole = _copy(done, tmp_path / "half", 6), _copy(done, tmp_path / "whole")
    _as_an_older_version_left_it(whole)
    _as_an_older_version_left_it(run)
    assert _again(run) == 0
    assert "checkpoint-4: does not record all that makes its run (an older version wrote it, " in caplog.text
    assert "; not compared, but for the base as far as it is recorded (sample " in caplog.text
    assert [line["samples_digest"] for line in metrics_of(run.path)] == [
        line["samples_digest"] for line in metrics_of(whole.path)
    ]
    assert run_of(run.path).plan.samples_digest == "positions"
    assert run_of(run.path).facts(6)["identity"] == run_of(done.path).facts(6)["identity"]
    caplog.clear()
    assert _again(run) == 0
    assert "does not record" not in caplog.text
    assert run_of(run.path).plan.samples_digest == "positions"


def test_an_older_version_s_base_is_compared_as_far_as_it_was_recorded(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _copy(done, tmp_path, 6)
    _as_an_older_version_left_it(run)
    for module in ("checkpoint.resume", "setup"):
        monkeypatch.setattr(f"trainer.{module}.old_base_identity", lambda _: "0" * 64)
    assert _again(run) == 2
    said = capsys.readouterr().err
    assert "model.content: the run has" in said
    assert "--allow model.content" in said
    marker = read_marker(run)
    assert marker is not None
    assert marker.kind == "REFUSED"
    assert _again(run, "--allow", "model.content") == 0


def test_lost_and_doubled_figures_are_said_at_the_resume(
    done: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _copy(done, tmp_path, 6)
    lines = run.metrics_file.read_text().splitlines()
    run.metrics_file.write_text("\n".join([lines[0], lines[0], lines[1], lines[2][:30], *lines[3:]]))
    assert _again(run) == 0
    assert "had more than one line of step 1;" in caplog.text
    assert "has no whole line of step 3 (" in caplog.text
    assert [line["step"] for line in metrics_of(run.path)] == [1, 2, 4, 5, 6]
