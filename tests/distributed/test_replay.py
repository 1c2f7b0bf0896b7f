"""Steps of a run of two processes, taken again by one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.distributed.launching import drive, interrupt, started, wait_until
from tests.helpers.distributed.recorded import write_recipe
from tests.helpers.launcher import samestep


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 steps under ddp x 2, a checkpoint after 4."""
    folder = tmp_path_factory.mktemp("replay")
    recipe = write_recipe(world, folder / "recipe.yaml", checkpoint={"every_steps": 4})
    drive(2, [([str(recipe), "--runs-dir", str(folder), "--name", "two"], None)], folder)
    return folder / "two"


def test_one_process_takes_the_steps_of_two_again_and_names_what_was_altered(
    run: Path, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("replay", str(run), "--steps", "6:7", "--gpus-per-node", "1")
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert samestep(*command, "--json") == 0
    printed, said = capfd.readouterr()
    assert "same command goes on" not in said
    assert "trainer_state.json" not in said  # of the copy's cadence of saves, which is another one on purpose
    (result,) = json.loads(printed[printed.index("[{") :])
    assert (result["checkpoint"], result["strategy"], result["world_size"]) == ("checkpoint-4", "single", 1)
    assert result["parting"] is None
    assert result["largest_loss_difference"] < 1e-6
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == files
    assert [entry.name for entry in run.parent.iterdir() if "replay" in entry.name] == []

    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[6] = json.dumps(json.loads(lines[6]) | {"loss": 1.0})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert samestep(*command) == 1
    assert "DIFFERENT from step 7 on, loss was 1.0" in capfd.readouterr().out

    weights = load_file(world / "base" / "model.safetensors")
    before = (world / "base" / "model.safetensors").read_bytes()
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] += 1
    try:
        save_file(weights, world / "base" / "model.safetensors", {"format": "pt"})
        assert samestep(*command) == 2
        said = capfd.readouterr().err
        assert "or --allow model.weights" in said
        assert f"{run}: was begun otherwise (values that differ: 1); bring back what it was made of" in said
        assert "--fresh" not in said
    finally:
        (world / "base" / "model.safetensors").write_bytes(before)


def test_a_ctrl_c_ends_a_replay_without_a_result_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launch.cli.main",
        "replay",
        str(run),
        "--steps",
        "6:7",
        "--gpus-per-node",
        "1",
    ]
    log = tmp_path / "log"
    with started(command, log) as process:
        wait_until(lambda: any(run.parent.glob(".replay-*/two/environment.json")), 120)
        interrupt(process)
        assert process.wait(60) == 130
    words = log.read_text()
    assert "resuming at step" not in words
    assert "same command goes on" not in words
    assert "trainer_state.json" not in words
    assert [entry.name for entry in run.parent.iterdir() if "replay" in entry.name] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0:3"], "is no range of steps"),
        (["--steps", "5:9"], "is not among the steps 1 to 8"),
        (["--steps", "a:b"], "is no range of steps"),
        ([], "give the steps, such as 40:45, or --random 3"),
        (["--steps", "1", "--random", "2"], "give the steps, such as 40:45, or --random 3"),
    ],
)
def test_steps_that_were_not_taken_are_refused(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("replay", str(run), *options) == 2
    assert words in capsys.readouterr().err
