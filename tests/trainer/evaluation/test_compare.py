"""Comparison: nothing but rounding where the merge is right, plain to see where the wrong model lies in the folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe.loading import recipe_from_dict
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from tests.helpers.adapters import write_run
from tests.helpers.merging import merge
from trainer.data.rows import question_row
from trainer.evaluation import compare
from trainer.evaluation.compare import main
from trainer.evaluation.comparison import MergeComparison, Seen, answered, difference, print_comparison


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of a 4-bit recipe with its merged model."""
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = True
    run = write_run(recipe_from_dict(values), tmp_path_factory.mktemp("compare") / "run")
    merge(run.path, run.merged)
    return run


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the command found, behind the tables that it prints."""
    found: list[MergeComparison] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compare,
            "print_comparison",
            lambda comparison, console: (found.append(comparison), print_comparison(comparison, console)),
        )
        assert main(["--samples", "4", *arguments]) == 0
    assert found[0].reference in capsys.readouterr().out
    return asdict(found[0])


def test_both_merges_are_set_beside_the_model_as_it_was_trained(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    users = run.path / "merged.other-base"
    users.mkdir()
    (users / "merge.json").write_text("{}")
    found = compared(capsys, "--source", str(run.path), "--merged", str(run.merged), "--both-bases")
    assert json.loads((run.merged / "comparison.json").read_text())["reference"] == found["reference"]
    assert (found["samples"], found["dtype"], found["reference"]) == (4, "float32", "4-bit base + adapter")
    assert found["positions"] > 4
    original, dequantized = found["merged"]
    assert (original["model"], dequantized["model"]) == ("merged, original", "merged, dequantized")
    assert original["unmerged"]["largest"] < 1e-4
    assert original["unmerged"]["agreement"] == 1.0
    assert original["quantized"]["largest"] > 100 * original["unmerged"]["largest"]
    assert (
        dequantized["quantized"]["largest"] < 1e-4
    )  # fp32 throughout: the weights are those of the training
    assert dequantized["unmerged"]["largest"] > 100 * dequantized["quantized"]["largest"]

    answers = {each["model"]: each for each in found["answers"]}
    assert answers["4-bit base + adapter"]["same"] == answers["merged, dequantized"]["same"] == 1.0
    assert answers["merged, original"]["same"] == answers["base + adapter"]["same"]
    assert [path.name for path in run.path.glob("*.other-base*")] == [users.name]
    assert (users / "merge.json").read_text() == "{}"


def test_a_folder_with_another_model_shows(
    run: RunDirectory, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(
        capsys, "--source", str(run.adapter), "--merged", str(world / "base"), "--run-dir", str(run.path)
    )
    assert found["merged"][0]["model"] == "merged, base"
    assert not (world / "base" / "comparison.json").exists()  # no merge of ours
    assert found["merged"][0]["unmerged"]["largest"] > 0.1
    assert found["merged"][0]["unmerged"]["mean"] > 0.001


def test_a_merge_in_bf16_is_compared_in_bf16(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(run.path, tmp_path / "half", dtype="bfloat16")
    found = compared(capsys, "--source", str(run.path), "--merged", str(tmp_path / "half"))
    assert found["dtype"] == "bfloat16"
    unmerged = found["merged"][0]["unmerged"]
    assert 1e-5 < unmerged["largest"] < 0.05 * unmerged["logit_range"]


def test_answers_are_counted_as_same_and_as_right() -> None:
    rows = [question_row([b""], "?", ["10"], 0), question_row([b""], "?", ["Asia"], 1)]
    mine, reference = Seen(torch.zeros(1), ("10.4", "asia")), Seen(torch.zeros(1), ("10.4", "Asia"))
    found = answered("m", mine, reference, rows)
    assert (found.same, found.correct, found.accuracy) == (0.5, 2, 100.0)


def test_what_is_missing_is_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--source", str(run.path), "--merged", str(tmp_path)], "no config.json"),
        (["--source", str(tmp_path), "--merged", str(run.merged)], "no adapter, and no checkpoint"),
        (
            ["--source", str(run.path), "--merged", str(run.merged), "--run-dir", str(tmp_path)],
            "no recipe.yaml",
        ),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_the_difference_is_absolute_and_counts_first_tokens() -> None:
    merged = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 1.0, 1.5], [2.0, 0.0, -0.5]])
    found = difference(merged, other)
    assert (found.largest, found.mean, found.logit_range, found.agreement) == (1.0, 0.5, 2.5, 0.5)
