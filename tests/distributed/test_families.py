"""Every family takes the same steps on one process and on several, resumes to the byte, and merges as PEFT does.

Qwen2-VL is what all other tests are about.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed.here import drive_here
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    apart,
    assert_the_same_to_the_byte,
    evaluations_of,
    write_recipe,
)
from tests.helpers.tiny_families import write_tiny

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
STRATEGIES = ("ddp", "zero3", "fsdp")
CACHED = "cached"


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<family>-<strategy>`, 4 steps with dropout; `<family>-stopped` stops at 2 and goes on; `<family>-cached` reads
    features from memory. One launch for each strategy of two processes."""
    folder = tmp_path_factory.mktemp("families")
    recipes: dict[str, Path] = {}
    for kind in FAMILIES:
        base = write_tiny(kind, folder / kind)
        for name, data in ((kind, {}), (f"{kind}-{CACHED}", {"vision_cache": "disk"})):
            recipes[name] = write_recipe(
                world,
                folder / f"{name}.yaml",
                model={"name_or_path": str(base)},
                data=data,
                training={"max_steps": 4, "gradient_checkpointing": 2},
                checkpoint={"every_steps": 2},
            )

    def request(recipe: str, name: str, stop: int | None = None) -> tuple[list[str], int | None]:
        return [str(recipes[recipe]), "--runs-dir", str(folder), "--name", name], stop

    alone = []
    for kind in FAMILIES:
        alone += [request(kind, f"{kind}-single"), request(kind, f"{kind}-stopped", 2)]
        alone += [request(kind, f"{kind}-stopped"), request(f"{kind}-{CACHED}", f"{kind}-{CACHED}")]
    drive_here(alone)
    for strategy in STRATEGIES:
        drive(2, [request(kind, f"{kind}-{strategy}") for kind in FAMILIES], folder, strategy=strategy)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_processes_take_the_steps_of_one(runs: Path, kind: str, strategy: str) -> None:
    loss, weights = apart(runs / f"{kind}-{strategy}", runs / f"{kind}-single")
    print(f"{kind} with {strategy}: losses within {loss:.1e} relative, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(runs: Path, kind: str) -> None:
    assert_the_same_to_the_byte(runs / f"{kind}-stopped", runs / f"{kind}-single")


@pytest.mark.parametrize("kind", FAMILIES)
def test_features_from_the_cache_are_those_of_the_tower(runs: Path, kind: str) -> None:
    """Fresh in the first steps, and read in those after, since the samples come again."""
    loss, weights = apart(runs / f"{kind}-{CACHED}", runs / f"{kind}-single")
    assert loss <= 1e-6
    assert weights <= 1e-6
    assert evaluations_of(runs / f"{kind}-{CACHED}") == evaluations_of(runs / f"{kind}-single")
