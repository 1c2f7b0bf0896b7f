"""What runs of the tests wrote, and the recipes they ran."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from launch.checkpoints.manifest import read_manifest
from launch.planning.plan import Plan
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values


def write_recipe(world: Path, file: Path, kind: str = "plain", **changes: dict[str, Any]) -> Path:
    """A recipe of 8 steps with dropout 0.05 on the small world, `plain` or `nf4`, with sections changed.

    The learning rate is the shipped recipes': AdamW divides by each element's own gradient, so where that is all
    but zero, the rounding of another order of summation becomes a share of the rate.
    """
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = kind == "nf4"
    values["training"] |= {"max_steps": 8, "learning_rate": 2e-4}
    values["lora"] = {"lora_dropout": 0.05}
    values["evaluation"] = {"every_steps": 2, "max_samples": 10}
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change
    file.write_text(dump_recipe(recipe_from_dict(values)))
    return file


GPU_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-3}
"""dtype of the products -> the largest relative difference of losses; kernels of other shapes sum in other orders."""


def write_recipes_of_dtypes(world: Path, folder: Path, **changes: dict[str, Any]) -> dict[str, Path]:
    """NF4 recipes `<dtype>.yaml`, one for each dtype of `GPU_TOLERANCES`, for the base and its products."""
    return {
        dtype: write_recipe(
            world,
            folder / f"{dtype}.yaml",
            "nf4",
            model={"dtype": dtype},
            quantization={"bnb_4bit_compute_dtype": dtype},
            **changes,
        )
        for dtype in GPU_TOLERANCES
    }


def write_tried_recipe(world: Path, file: Path, dtype: str) -> Path:
    """NF4, 2 steps whose largest micro-batch is tried; all of a rank fits one, and may come down to more."""
    return write_recipe(
        world,
        file,
        "nf4",
        model={"dtype": dtype},
        quantization={"bnb_4bit_compute_dtype": dtype},
        training={"max_steps": 2, "warmup_steps": 0, "gradient_checkpointing": 2},
        batch={"global_batch_size": 8},
    )


@dataclass(frozen=True)
class Recorded:
    """A run directory, read."""

    directory: RunDirectory

    @property
    def plan(self) -> Plan:
        return Plan.from_json(self.directory.plan_file.read_text())

    def facts(self, step: int) -> dict[str, Any]:
        """Of the checkpoint at `step`."""
        facts: dict[str, Any] = read_manifest(self.directory.checkpoint(step), verify=True)["facts"]
        return facts


def run_of(folder: Path) -> Recorded:
    return Recorded(RunDirectory(folder))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def sha256_of(run: Path) -> str:
    """Of the final adapter."""
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def published_files(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    files = [file for folder in run.glob("checkpoint-*") for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def apart(one: Path, other: Path) -> tuple[float, float]:
    """(largest relative difference of losses, largest absolute difference of adapter weights) of two runs.

    Their digests must be equal: other samples are no comparison.
    """
    lines = list(zip(metrics_of(one), metrics_of(other), strict=True))
    assert all(a["samples_digest"] == b["samples_digest"] for a, b in lines)
    losses = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in lines]
    left, right = adapter_of(one), adapter_of(other)
    assert left.keys() == right.keys()
    return max(losses), max((left[name] - right[name]).abs().max().item() for name in right)


def assert_the_same_to_the_byte(run: Path, straight: Path) -> None:
    """Adapter, every figure of every step but its seconds and a GPU's memory, every evaluation."""
    assert sha256_of(run) == sha256_of(straight)
    others = dict.fromkeys(("seconds", "memory_allocated", "memory_reserved"))
    for line, expected in zip(metrics_of(run), metrics_of(straight), strict=True):
        assert line | others == expected | others
    assert evaluations_of(run) == evaluations_of(straight)


def assert_came_down(tried: Path, fixed: Path) -> None:
    """Both kinds of trial have failed, the run went on with more micro-batches, and `fixed` has as many."""
    plan = run_of(tried).plan
    assert (plan.settings.tried, plan.settings.out_of_memory) == (True, 0)
    assert "after a GPU ran out of memory" in plan.settings.reason
    assert plan.micro_batches == run_of(fixed).plan.micro_batches > 2
    # On a GPU sharded layers that stay whole are let go first, and the same fails again.
    failed = dict.fromkeys(tried.with_suffix(".trials").read_text().splitlines())
    assert [*failed] == [f"backward of rank {plan.world_size - 1}", "forward of rank 0"]
