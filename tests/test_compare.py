"""Comparison of logits: none where merging only rounds, plain where the wrong model lies in the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe import recipe_from_dict
from launch.run_directory import RunDirectory
from tests.adapters import write_run
from tests.conftest import recipe_values
from trainer.checkpoint.merge import merge
from trainer.evaluation.compare import difference, main


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of a 4-bit recipe with its merged model."""
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = True
    run = write_run(recipe_from_dict(values), tmp_path_factory.mktemp("compare") / "run")
    merge(run.path, run.merged)
    return run


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["--samples", "4", *arguments]) == 0
    shown = capsys.readouterr().out
    found: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return found


def test_a_good_merge_differs_from_base_and_adapter_by_rounding_and_from_the_4_bit_base_by_more(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(capsys, "--source", str(run.path), "--merged", str(run.merged))
    assert (found["samples"], found["dtype"]) == (4, "float32")
    assert found["positions"] > 4
    assert found["unmerged"]["largest"] < 1e-4
    assert found["unmerged"]["agreement"] == 1.0
    assert found["quantized"]["largest"] > 100 * found["unmerged"]["largest"]


def test_a_folder_with_another_model_shows(
    run: RunDirectory, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compared(
        capsys, "--source", str(run.adapter), "--merged", str(world / "base"), "--run-dir", str(run.path)
    )
    assert found["unmerged"]["largest"] > 0.1
    assert found["unmerged"]["mean"] > 0.001


def test_a_merge_in_bf16_is_compared_in_bf16(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(run.path, tmp_path / "half", dtype="bfloat16")
    found = compared(capsys, "--source", str(run.path), "--merged", str(tmp_path / "half"))
    assert found["dtype"] == "bfloat16"
    assert 1e-5 < found["unmerged"]["largest"] < 0.05 * found["unmerged"]["logit_range"]


def test_what_is_missing_is_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["--source", str(run.path), "--merged", str(tmp_path)], "no config.json"),
        (["--source", str(tmp_path), "--merged", str(run.merged)], "no adapter_config.json"),
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
