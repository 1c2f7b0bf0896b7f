"""The promises about sameness, with real launches: world sizes 1 to 4, and runs killed in the middle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.recipe import dump_recipe, recipe_from_dict
from tests.conftest import recipe_values
from tests.distributed.launching import drive

WORLD_SIZES = (1, 2, 3, 4)
RESUMED_WORLD_SIZES = (1, 2)
KINDS = ("plain", "nf4")


def _write_recipe(world: Path, folder: Path, kind: str, *, steps: int, dropout: float) -> Path:
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = kind == "nf4"
    values["training"]["max_steps"] = steps
    values["lora"] = {"lora_dropout": dropout}
    values["evaluation"] = {"every_steps": 2, "max_samples": 10}
    file = folder / f"{kind}-{steps}-{dropout}.yaml"
    file.write_text(dump_recipe(recipe_from_dict(values)))
    return file


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs this module looks at, in as few launches as they need.

    `same-<kind>-<world size>`: 8 steps without dropout. `straight-...` and `cut-...`: 6 steps with dropout, the
    second killed with SIGKILL after its checkpoint at step 3 and resumed in a new launch.
    """
    folder = tmp_path_factory.mktemp("same")
    same = {kind: _write_recipe(world, folder, kind, steps=8, dropout=0.0) for kind in KINDS}
    six = {kind: _write_recipe(world, folder, kind, steps=6, dropout=0.05) for kind in KINDS}

    def request(recipe: Path, name: str) -> list[str]:
        return [str(recipe), "--runs-dir", str(folder), "--name", name]

    for size in WORLD_SIZES:
        requests = [request(same[kind], f"same-{kind}-{size}") for kind in KINDS]
        if size not in RESUMED_WORLD_SIZES:
            drive(size, requests, folder)
            continue
        requests += [request(six[kind], f"straight-{kind}-{size}") for kind in KINDS]
        for kind in KINDS:
            cut = request(six[kind], f"cut-{kind}-{size}")
            drive(size, [*requests, cut], folder, kill_when=_past_step_3(folder / f"cut-{kind}-{size}"))
            requests = [cut]
        drive(size, requests, folder)
    return folder


def _past_step_3(run: Path) -> Callable[[], bool]:
    """True once the checkpoint of step 3 is published and a later step is on record."""

    def look() -> bool:
        metrics = run / "metrics.jsonl"
        return (run / "checkpoint-3" / "manifest.json").exists() and metrics.read_text().count("\n") >= 4

    return look


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def _adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def _sha256(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def _apart(one: Path, other: Path) -> tuple[float, float]:
    """(largest relative difference of losses, largest absolute difference of adapter weights)."""
    losses = [
        abs(a["loss"] - b["loss"]) / abs(b["loss"])
        for a, b in zip(_metrics(one), _metrics(other), strict=True)
    ]
    left, right = _adapter(one), _adapter(other)
    assert left.keys() == right.keys()
    return max(losses), max((left[name] - right[name]).abs().max().item() for name in right)


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
@pytest.mark.parametrize(("kind", "tolerance"), [("plain", 1e-6), ("nf4", 1e-5)])
def test_every_world_size_takes_the_same_steps(runs: Path, kind: str, tolerance: float, size: int) -> None:
    one, several = runs / f"same-{kind}-1", runs / f"same-{kind}-{size}"
    assert len(_metrics(one)) == 8
    for key in ("samples_digest", "target_tokens", "tokens", "samples", "learning_rate", "step"):
        assert [line[key] for line in _metrics(several)] == [line[key] for line in _metrics(one)]
    loss, weights = _apart(several, one)
    print(f"{kind}, world size {size}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= tolerance
    assert weights <= tolerance


def test_the_steps_train(runs: Path) -> None:
    moved = _adapter(runs / "same-nf4-1")
    assert all(tensor.abs().max() > 0 for tensor in moved.values())
    losses = [line["loss"] for line in _evaluations(runs / "same-nf4-1")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_evaluations_see_every_sample_once_and_agree(runs: Path, size: int) -> None:
    one, several = _evaluations(runs / "same-plain-1"), _evaluations(runs / f"same-plain-{size}")
    assert [line["step"] for line in several] == [2, 4, 6, 8]
    assert {line["samples"] for line in several} == {10}
    assert [line["loss"] for line in several] == pytest.approx([line["loss"] for line in one], rel=1e-6)


@pytest.mark.parametrize("size", RESUMED_WORLD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_is_the_straight_run_to_the_byte(runs: Path, kind: str, size: int) -> None:
    straight, cut = runs / f"straight-{kind}-{size}", runs / f"cut-{kind}-{size}"
    assert _sha256(cut) == _sha256(straight)
    for line, expected in zip(_metrics(cut), _metrics(straight), strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}
    assert _evaluations(cut) == _evaluations(straight)


def test_metrics_hold_one_line_per_step(runs: Path) -> None:
    assert [line["step"] for line in _metrics(runs / "cut-plain-2")] == [1, 2, 3, 4, 5, 6]
