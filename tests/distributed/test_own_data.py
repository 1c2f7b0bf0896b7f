"""Chats of none to several images and one to three questions: the promises hold for them as for ChartQA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.inputs.dataset_index import read_index
from launch.planning.run_steps import step_plan
from launch.recipe.loading import dump_recipe, load_recipe, recipe_from_dict
from tests.helpers.chats import chats_recipe, write_chats
from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.killing import Hit, survive
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    apart,
    assert_the_same_to_the_byte,
    evaluations_of,
    metrics_of,
    run_of,
)
from tests.helpers.tiny_families import write_tiny

RUNS = (("ddp", 2), ("zero3", 2))
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
OF_FOUR = ("ddp", "fsdp", "zero3")


def _write_recipe(
    world: Path, folder: Path, name: str, steps: int, base: Path | None = None, **data: Any
) -> Path:
    values = chats_recipe(world, folder / "chats", **data)
    if base is not None:
        values["model"]["name_or_path"] = str(base)
    # A rank's micro-batches hold one or two samples: some of them no image, on this rank or that.
    values["batch"] = {"global_batch_size": 8, "micro_batch_tokens": 330}
    values["training"] |= {"max_steps": steps, "learning_rate": 2e-4}
    values["lora"] = {"lora_dropout": 0.05}
    answers = {} if data else {"answers": 4, "max_new_tokens": 3, "metrics": ["token_f1"]}
    values["evaluation"] = {"every_steps": 2, "max_samples": 6, **answers}
    values["checkpoint"] = {"every_steps": 1}
    file = folder / f"{name}.yaml"
    file.write_text(dump_recipe(recipe_from_dict(values)))
    return file


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`single-1` and `<strategy>-<processes>` of 4 steps; `unvalidated`: 2 steps without a validation split."""
    folder = tmp_path_factory.mktemp("own-data")
    write_chats(folder / "chats", {"train": 40, "val": 8})
    recipe = _write_recipe(world, folder, "four", 4)

    def request(name: str, of: Path = recipe) -> tuple[list[str], int | None]:
        return [str(of), "--runs-dir", str(folder), "--name", name], None

    without = _write_recipe(world, folder, "without", 2, validation=None)
    drive_here([request("single-1"), request("unvalidated", without)])
    for strategy, processes in RUNS:
        drive(processes, [request(f"{strategy}-{processes}")], folder, strategy=strategy)
    return folder


@pytest.fixture(scope="module")
def long_runs(world: Path, runs: Path) -> Path:
    """Beside `runs`: `<strategy>-4` and `<family>-<strategy>-4`, a launch for each strategy; `straight`, 6 steps on
    two processes."""
    recipes = {"": runs / "four.yaml"}
    for kind in FAMILIES:
        base = write_tiny(kind, runs / f"base-{kind}")
        recipes[f"{kind}-"] = _write_recipe(world, runs, kind, 4, base)

    def request(name: str, of: Path) -> tuple[list[str], int | None]:
        return [str(of), "--runs-dir", str(runs), "--name", name], None

    drive_here([request(f"{kind}-single-1", runs / f"{kind}.yaml") for kind in FAMILIES])
    for strategy in OF_FOUR:
        requests = [request(f"{prefix}{strategy}-4", recipe) for prefix, recipe in recipes.items()]
        drive(4, requests, runs, strategy=strategy)
    drive(2, [request("straight", _write_recipe(world, runs, "six", 6))], runs)
    return runs


def _is_without_images_on_one_rank_alone(recipe_file: Path, run: Path) -> bool:
    """At some place of some step a rank's micro-batch has no image, and another rank's has some."""
    recipe, plan = load_recipe(recipe_file), run_of(run).plan
    index = read_index(recipe)
    assert index is not None
    split = index.splits["train"]
    for step in range(plan.max_steps):
        for together in zip(*step_plan(recipe, index, plan).ranks(step), strict=True):
            images = [sum(len(split.tokens_of_images(n)) for n in batch.samples) for batch in together]
            if min(images) == 0 < max(images):
                return True
    return False


@pytest.mark.parametrize(("strategy", "processes"), RUNS)
def test_every_world_takes_the_same_steps_on_chats(runs: Path, strategy: str, processes: int) -> None:
    _assert_the_same_steps(runs / "four.yaml", runs / "single-1", runs / f"{strategy}-{processes}")


def _assert_the_same_steps(recipe: Path, one: Path, several: Path) -> None:
    loss, weights = apart(several, one)
    print(f"chats, {several.name}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6
    assert len(metrics_of(one)) == 4
    assert _is_without_images_on_one_rank_alone(recipe, several)
    assert [line["target_tokens"] for line in metrics_of(several)] == [
        line["target_tokens"] for line in metrics_of(one)
    ]
    for key in ("accuracy", "answers", "answers_digest"):
        assert [line[key] for line in evaluations_of(several)] == [line[key] for line in evaluations_of(one)]
    assert [line["loss"] for line in evaluations_of(several)] == pytest.approx(
        [line["loss"] for line in evaluations_of(one)], rel=1e-6
    )


@pytest.mark.long
@pytest.mark.parametrize("strategy", OF_FOUR)
@pytest.mark.parametrize("kind", [None, *FAMILIES])
def test_four_processes_take_the_same_steps_on_chats(
    long_runs: Path, strategy: str, kind: str | None
) -> None:
    prefix = f"{kind}-" if kind else ""
    recipe = long_runs / f"{kind or 'four'}.yaml"
    _assert_the_same_steps(recipe, long_runs / f"{prefix}single-1", long_runs / f"{prefix}{strategy}-4")


@pytest.mark.long
def test_a_killed_run_on_chats_ends_with_the_bytes_of_the_straight_one(long_runs: Path) -> None:
    six, run = long_runs / "six.yaml", long_runs / "killed"
    arguments = ["trainer.train", str(six), "--runs-dir", str(long_runs), "--name", "killed"]
    survive(arguments, run, 2, (Hit("all", False, 2),), long_runs / "log")
    assert_the_same_to_the_byte(run, long_runs / "straight")


def test_a_run_without_a_validation_split_trains_and_evaluates_nothing(runs: Path) -> None:
    assert [line["step"] for line in metrics_of(runs / "unvalidated")] == [1, 2]
    assert metrics_of(runs / "unvalidated")[0]["loss"] == pytest.approx(
        metrics_of(runs / "single-1")[0]["loss"], rel=1e-6
    )
    assert (runs / "unvalidated" / "adapter").is_dir()
    assert not (runs / "unvalidated" / "evaluations.jsonl").exists()
