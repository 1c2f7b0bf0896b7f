"""Every family takes the same steps on one process and on several, and resumes to the byte; so does LoRA in its tower.

Qwen2-VL is what all other tests are about.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.killing import Hit, survive
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    adapter_of,
    apart,
    assert_the_same_to_the_byte,
    evaluations_of,
    write_recipe,
)
from tests.helpers.tiny_families import write_tiny

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
TOWER = {"qwen2_5_vl": ["qkv", "down_proj", "merger.mlp.0"], "qwen3_vl": ["attn.proj", "linear_fc2"]}
"""Layers with LoRA besides `q_proj`, in blocks and mergers; `down_proj` is the decoder's alone."""
DORA = "dora"
IN_DEFAULT_TIER = {"ddp": [*FAMILIES, "qwen2_5_vl-tower"]}
LONG = {
    "ddp": ["qwen3_vl-tower", DORA],
    "zero3": [*FAMILIES],
    "fsdp": [*FAMILIES, *(f"{kind}-tower" for kind in FAMILIES)],
    "zero2": ["qwen3_vl-tower", DORA],
}
RUNS = [(strategy, name) for strategy, names in IN_DEFAULT_TIER.items() for name in names]
LONG_RUNS = [(strategy, name) for strategy, names in LONG.items() for name in names]


@pytest.fixture(scope="module")
def recipes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """4 steps with dropout: each family plain, with features from disk, and with LoRA in its tower; DoRA of one."""
    folder = tmp_path_factory.mktemp("families")
    bases = {kind: write_tiny(kind, folder / kind) for kind in FAMILIES}

    def write(name: str, kind: str, **changes: dict[str, object]) -> Path:
        return write_recipe(
            world,
            folder / f"{name}.yaml",
            model={"name_or_path": str(bases[kind])},
            training={"max_steps": 4, "gradient_checkpointing": 2},
            checkpoint={"every_steps": 2},
            **changes,
        )

    found = {}
    for kind in FAMILIES:
        lora = {"target_modules": ["q_proj", *TOWER[kind]], "use_rslora": True, "rank_pattern": {"q_proj": 4}}
        found[kind] = write(kind, kind)
        found[f"{kind}-cached"] = write(f"{kind}-cached", kind, data={"vision_cache": "disk"})
        found[f"{kind}-tower"] = write(f"{kind}-tower", kind, lora=lora | {"alpha_pattern": {"q_proj": 24}})
    found[DORA] = write(DORA, "qwen3_vl", lora={"use_dora": True})
    return found


def _request(
    recipes: dict[str, Path], name: str, suffix: str, stop: int | None = None
) -> tuple[list[str], int | None]:
    file = recipes[name]
    return [str(file), "--runs-dir", str(file.parent), "--name", f"{name}-{suffix}"], stop


@pytest.fixture(scope="module")
def runs(recipes: dict[str, Path]) -> Path:
    """`<recipe>-<strategy>`; `<recipe>-stopped` stops at step 2 and goes on. One launch for each strategy."""
    alone = [_request(recipes, name, "single") for name in recipes]
    for name in (*FAMILIES, "qwen2_5_vl-tower"):
        alone += [_request(recipes, name, "stopped", 2), _request(recipes, name, "stopped")]
    drive_here(alone)
    folder = recipes[DORA].parent
    for strategy, names in IN_DEFAULT_TIER.items():
        drive(2, [_request(recipes, name, strategy) for name in names], folder, strategy=strategy)
    return folder


@pytest.fixture(scope="module")
def long_runs(runs: Path, recipes: dict[str, Path]) -> Path:
    for strategy, names in LONG.items():
        drive(2, [_request(recipes, name, strategy) for name in names], runs, strategy=strategy)
    return runs


@pytest.fixture(scope="module")
def straight_runs(world: Path, runs: Path) -> Path:
    """`<family>-straight`: 8 steps on two processes, a checkpoint after each."""
    requests = []
    for kind in FAMILIES:
        recipe = write_recipe(
            world,
            runs / f"{kind}-eight.yaml",
            model={"name_or_path": str(runs / kind)},
            training={"max_steps": 8},
            checkpoint={"every_steps": 1},
        )
        requests.append(([str(recipe), "--runs-dir", str(runs), "--name", f"{kind}-straight"], None))
    drive(2, requests, runs)
    return runs


@pytest.mark.parametrize(("strategy", "name"), RUNS)
def test_two_processes_take_the_steps_of_one(runs: Path, strategy: str, name: str) -> None:
    loss, weights = apart(runs / f"{name}-{strategy}", runs / f"{name}-single")
    print(f"{name} with {strategy}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "name"), LONG_RUNS)
def test_the_other_strategies_take_the_steps_of_one(long_runs: Path, strategy: str, name: str) -> None:
    test_two_processes_take_the_steps_of_one(long_runs, strategy, name)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2_5_vl-tower"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(runs: Path, name: str) -> None:
    assert_the_same_to_the_byte(runs / f"{name}-stopped", runs / f"{name}-single")


@pytest.mark.long
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_run_killed_on_all_ranks_ends_with_the_bytes_of_the_straight_one(
    straight_runs: Path, kind: str
) -> None:
    run = straight_runs / f"{kind}-killed"
    arguments = ["trainer.train", str(straight_runs / f"{kind}-eight.yaml")]
    arguments += ["--runs-dir", str(straight_runs), "--name", run.name]
    survive(arguments, run, 2, (Hit("all", False, 2),), straight_runs / f"{kind}-log")
    assert_the_same_to_the_byte(run, straight_runs / f"{kind}-straight")


@pytest.mark.parametrize("kind", FAMILIES)
def test_features_from_the_cache_are_those_of_the_tower(runs: Path, kind: str) -> None:
    """Fresh when a sample is seen first, and read when it comes again."""
    loss, weights = apart(runs / f"{kind}-cached-single", runs / f"{kind}-single")
    assert loss <= 1e-6
    assert weights <= 1e-6
    cached, plain = evaluations_of(runs / f"{kind}-cached-single"), evaluations_of(runs / f"{kind}-single")
    assert [line["loss"] for line in cached] == pytest.approx([line["loss"] for line in plain], rel=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_lora_in_the_tower_trains(runs: Path, kind: str) -> None:
    moved = adapter_of(runs / f"{kind}-tower-single")
    tower = {name: tensor for name, tensor in moved.items() if ".visual." in name}
    assert len(tower) >= 6
    assert all(tensor.any() for tensor in moved.values())
    assert not any("down_proj" in name for name in tower)
