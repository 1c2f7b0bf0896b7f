"""A run that goes on after it was merged: nothing takes the old merged model for one of the new adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.checkpoints.adapter_file import read_digest
from launch.errors import ConfigError
from launch.run.directory import RunDirectory, is_done_at
from launch.run.merged_model import made_anew, merges_behind
from tests.helpers.launcher import EMBEDDED, Launcher, samestep, stand_in, write_adapter


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return stand_in(monkeypatch, tmp_path)


@pytest.fixture
def run(launcher: Launcher) -> RunDirectory:
    """A run that is done, with both merged models of its adapter."""
    assert samestep("run", *EMBEDDED) == 0
    found = RunDirectory(Path("runs/embedded").absolute())
    _train(found, 1.0)
    for folder in (found.merged, found.merged_dequantized):
        _merge(found, folder)
    assert merges_behind(found) == []
    return found


def _train(run: RunDirectory, value: float) -> None:
    write_adapter(run.adapter, value)
    os.utime(run.adapter / "adapter_model.safetensors", (1_000, 1_000))  # as a copy may be: ages say nothing


def _merge(run: RunDirectory, folder: Path, **record: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "merge.json").write_text(json.dumps(record or {"adapter_sha256": read_digest(run.adapter)}))


def test_evaluate_refuses_a_merged_model_of_an_earlier_adapter_and_names_the_command(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", "embedded", "--models", "adapter,merged"]
    assert samestep(*asked) == 0
    _train(run, 2.0)
    started = len(launcher.commands)
    assert samestep(*asked) == 2
    told = capsys.readouterr().err
    assert f"{run.merged}: is of another adapter than {run.adapter}" in told
    assert f"`samestep merge {run.path}` makes it anew" in told
    assert samestep("evaluate", "embedded", "--models", "adapter") == 0  # what is scored is the new one
    assert len(launcher.commands) == started + 1


def test_the_plain_evaluation_refuses_it_too(run: RunDirectory) -> None:
    from trainer.evaluation.request import EvaluationRequest, check_evaluation_request

    check_evaluation_request(EvaluationRequest(run, "test", ("adapter", "merged"), None))
    _train(run, 2.0)
    with pytest.raises(ConfigError, match="is of another adapter"):
        check_evaluation_request(EvaluationRequest(run, "test", ("merged",), None))
    check_evaluation_request(EvaluationRequest(run, "test", ("adapter",), None))


def test_status_says_so_of_both_merged_models(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep("status") == 0
    assert "another adapter" not in capsys.readouterr().out
    _train(run, 2.0)
    assert samestep("status") == 0
    told = capsys.readouterr().out.splitlines()
    notes = [line for line in told if "is of another adapter" in line]
    assert [line.partition(":")[0] for line in notes] == [str(run.merged), str(run.merged_dequantized)]
    assert f"`samestep merge {run.path} --base dequantized`" in notes[1]
    assert samestep("status", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["notes"] == notes


def test_merge_makes_it_anew_and_keeps_the_old_one_under_another_name(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("merge", "embedded") == 2  # it is of this adapter, and cannot be seen to be whole
    assert "merged exists already" in capsys.readouterr().err.replace("\n", "")
    assert not any("trainer.export.merge" in command for command in launcher.commands)
    assert not list(run.path.glob("merged.*"))
    _train(run, 2.0)
    launcher.status = 2  # the merge is refused, for a disk that is too small, say
    assert samestep("merge", "embedded") == 2
    assert (run.merged / "config.json").is_file()
    assert not list(run.path.glob("merged.*"))
    launcher.status = 0
    launcher.beside = lambda: _merge(run, run.merged)
    assert samestep("merge", "embedded") == 0
    (old,) = run.path.glob("merged.*")
    told = capsys.readouterr().out
    assert told.count("was of another adapter") == 1
    assert f"that one is now {old.relative_to(Path.cwd())}" in told
    assert [line.partition(":")[0] for line in merges_behind(run)] == [str(run.merged_dequantized)]


def test_a_merge_that_is_there_whole_is_done_already(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = read_digest(run.adapter)
    _merge(run, run.merged, base="original", dtypes=["F32"], converted=0, adapter_sha256=digest)
    weights = run.merged / "model.safetensors"
    save_file({"a": np.zeros(4, np.float32)}, weights)
    started = len(launcher.commands)
    assert samestep("merge", "embedded") == 0  # an interrupted command compared nothing yet
    assert ["trainer.evaluation.compare" in command for command in launcher.commands[started:]] == [True]
    assert "merged already, of this adapter; now it is compared" in capsys.readouterr().out.replace("\n", "")
    (run.merged / "comparison.json").write_text("{}")
    started = len(launcher.commands)
    for same in ([], ["--dtype", "float32"], ["--no-compare"]):
        assert samestep("merge", "embedded", *same) == 0
        assert "runs/embedded/merged: merged already, of this adapter" in capsys.readouterr().out.replace(
            "\n", ""
        )
    assert len(launcher.commands) == started
    assert samestep("merge", "embedded", "--compare") == 0
    assert "trainer.evaluation.compare" in launcher.commands[-1]
    assert len(launcher.commands) == started + 1

    def merge_is(*options: str) -> str:
        before = len(launcher.commands)
        status = samestep("merge", "embedded", "--no-compare", *options)
        begun = any("trainer.export.merge" in command for command in launcher.commands[before:])
        return "refused" if status == 2 else "begun" if begun else "done already"

    assert merge_is("--dtype", "bfloat16") == "refused"
    assert merge_is("--base", "dequantized") == "refused"
    assert merge_is("--base-model", "elsewhere") == "refused"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert merge_is() == "refused"
    weights.write_bytes(whole)
    assert merge_is() == "done already"
    _train(run, 2.0)
    assert merge_is() == "begun"


def test_a_merge_that_recorded_no_adapter_is_judged_by_its_age(run: RunDirectory) -> None:
    weights = run.adapter / "adapter_model.safetensors"
    _merge(run, run.merged, base="original")
    os.utime(run.merged / "config.json", (2_000, 2_000))
    for age, count in ((1_000, 0), (3_000, 1)):
        os.utime(weights, (age, age))
        assert len(merges_behind(run)) == count


@pytest.mark.parametrize("damage", [b"", b"\xff" * 20, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_an_adapter_that_cannot_be_read_is_no_reason_for_a_traceback(
    run: RunDirectory, damage: bytes
) -> None:
    (run.adapter / "adapter_model.safetensors").write_bytes(damage)
    assert merges_behind(run) == []  # not known to be of another: who reads the adapter says what is wrong
    assert samestep("status") == 0


@pytest.mark.parametrize(
    ("file", "damage"), [("adapter_model.safetensors", b"\xff" * 20), ("adapter_config.json", b'{"r": 8')]
)
def test_a_damaged_adapter_is_named_with_what_brings_it_back(
    run: RunDirectory, launcher: Launcher, capsys: pytest.CaptureFixture[str], file: str, damage: bytes
) -> None:
    assert is_done_at(run, 6)
    (run.adapter / file).write_bytes(damage)
    commands = [
        ("merge", "embedded"),
        ("merge", str(run.adapter), "--output", "m"),
        ("consolidate", "embedded", "--output", "c"),
        ("evaluate", "embedded"),
    ]
    started = len(launcher.commands)
    for command in commands:
        assert samestep(*command) == 2
        told = capsys.readouterr().err
        assert f"runs/embedded/adapter/{file}: is missing, cut or damaged; bring it back from a copy" in told
        assert "--output" not in told
    assert len(launcher.commands) == started
    run.checkpoint(4).mkdir()
    (run.checkpoint(4) / "manifest.json").write_text("{}")
    assert samestep("merge", "embedded") == 2
    assert "own `samestep run` command writes it again from checkpoint-4" in capsys.readouterr().err
    assert not is_done_at(run, 6)  # so that command goes on


def test_a_second_merge_at_the_same_moment_finds_nothing_in_its_way(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train(run, 2.0)
    with made_anew(run, run.merged) as first:
        assert first is not None
        monkeypatch.setattr(
            "launch.run.merged_model.is_of_another_adapter", lambda *_: True
        )  # it had looked before
        with made_anew(run, run.merged) as second:
            assert second is None
        run.merged.mkdir()
