"""Runs of several processes taken again by one; and what was changed since is named, at the step where it tells."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import write_world
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import write_recipe
from tests.helpers.launcher import samestep
from tests.long.results import record

pytestmark = pytest.mark.long

LAYOUTS = (("ddp", 4), ("zero3", 2))
KERNEL = """
import sys
if any("trainer.train" in word for word in sys.orig_argv):
    import torch
    silu = torch.nn.functional.silu
    torch.nn.functional.silu = lambda *words, **named: silu(*words, **named) * 1.05
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of its own, which is changed; in it a run for each of `LAYOUTS`: 8 steps, a checkpoint after 4."""
    folder = tmp_path_factory.mktemp("replayed")
    write_world(folder)
    for strategy, processes in LAYOUTS:
        recipe = write_recipe(folder, folder / f"{strategy}.yaml", checkpoint={"every_steps": 4})
        drive(
            processes,
            [([str(recipe), "--runs-dir", str(folder), "--name", strategy], None)],
            folder,
            strategy=strategy,
        )
    return folder


def _replay(capfd: pytest.CaptureFixture[str], run: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the result if there is one, what was said)."""
    capfd.readouterr()
    status = samestep("replay", str(run), "--steps", "6:7", "--gpus-per-node", "1", "--json", *options)
    printed, said = capfd.readouterr()
    results = json.loads(printed[printed.index("[{") :]) if "[{" in printed else [{}]
    return status, results[0], said


@pytest.mark.parametrize(("strategy", "processes"), LAYOUTS)
def test_one_process_takes_the_steps_of_several_again_within_rounding(
    place: Path, capfd: pytest.CaptureFixture[str], strategy: str, processes: int
) -> None:
    status, result, said = _replay(capfd, place / strategy)
    assert (status, result["parting"], result["tolerance"]) == (0, None, 1e-6), said
    assert result["largest_loss_difference"] < 1e-6
    record(
        f"Steps of {strategy} on {processes} taken again by one process (fp32)",
        [
            ("steps", "6 and 7, from checkpoint-4"),
            ("losses", f"within {result['largest_loss_difference']:.1e}"),
        ],
    )


def _other_answer(place: Path) -> Path:
    file = place / "charts" / "train-00000.parquet"
    table = pq.read_table(file)
    column = table.schema.field("label")
    answers = [["77"], *table.column("label").to_pylist()[1:]]
    pq.write_table(table.drop_columns("label").append_column(column, [answers]), file)
    return file


def _other_template(place: Path) -> Path:
    file = place / "base" / "chat_template.jinja"
    file.write_text(file.read_text().replace("{{- part.text -}}", "{{- part.text + '!' -}}"))
    return file


def _other_weight(place: Path) -> Path:
    file = place / "base" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("v_proj.weight"))
    weights[name][0] += 0.1
    save_file(weights, file, {"format": "pt"})
    return file


@pytest.mark.parametrize(
    ("change", "part", "quantities"),
    [
        (_other_answer, "data.train.rows", {"samples"}),
        (_other_template, "model.chat_template", {"samples", "target_tokens", "loss"}),
        (_other_weight, "model.weights", {"loss"}),
    ],
)
def test_a_changed_part_is_named_and_with_allow_the_first_step_and_figure_that_it_changes(
    place: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[Path], Path],
    part: str,
    quantities: set[str],
) -> None:
    before = {file: file.read_bytes() for folder in ("base", "charts") for file in (place / folder).iterdir()}
    file = change(place)
    try:
        status, _, said = _replay(capfd, place / "ddp")
        assert (status, part in said) == (2, True), said
        status, result, said = _replay(capfd, place / "ddp", "--allow", part)
    finally:
        file.write_bytes(before[file])
    assert status == 1, said
    assert (result["parting"]["step"], result["parting"]["quantity"] in quantities) == (5, True), result
    assert (result["environment"], result["altered_libraries"]) == ([], [])


def test_a_changed_kernel_tells_at_the_first_step(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KERNEL)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), before])))
    status, result, said = _replay(capfd, place / "ddp")
    assert (status, result["parting"]["step"], result["parting"]["quantity"]) == (1, 5, "loss")
    assert "no library file was changed" in said
