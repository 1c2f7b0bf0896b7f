"""Every world size, micro-batch budget, base and recomputation gives one run; so does every move between sizes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from launch.run.directory import Marker, RunDirectory, read_marker
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import apart, run_of, write_recipe
from tests.long.results import record

pytestmark = pytest.mark.long

SIZES = (1, 2, 3, 4)
BUDGETS: dict[str, Any] = {"auto": "auto", "roomy": 100_000, "tight": 200}
KINDS = {"plain": 1e-6, "nf4": 1e-5}
RECOMPUTED = {"kept": False, "recomputed": True}
CELLS = list(itertools.product(KINDS, BUDGETS, RECOMPUTED))


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>-<budget>-<recomputation>-<world size>`, 8 steps each, in one launch a world size."""
    folder = tmp_path_factory.mktemp("matrix")
    recipes = {
        cell: write_recipe(
            world,
            folder / f"{'-'.join(cell)}.yaml",
            cell[0],
            batch={"micro_batch_tokens": BUDGETS[cell[1]]},
            training={"gradient_checkpointing": RECOMPUTED[cell[2]]},
        )
        for cell in CELLS
    }
    for size in SIZES:
        requests = [
            ([str(recipe), "--runs-dir", str(folder), "--name", f"{'-'.join(cell)}-{size}"], None)
            for cell, recipe in recipes.items()
        ]
        drive(size, requests, folder, limit=1200)
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), KINDS.items())
def test_every_layout_takes_the_same_steps(runs: Path, kind: str, tolerance: float) -> None:
    rows = []
    straight = runs / f"{kind}-auto-kept-1"
    for budget, recomputed, size in itertools.product(BUDGETS, RECOMPUTED, SIZES):
        loss, weights = apart(runs / f"{kind}-{budget}-{recomputed}-{size}", straight)
        assert loss <= tolerance
        assert weights <= tolerance
        layout = f"world size {size}, budget {budget}, activations {recomputed}"
        rows.append((layout, f"digests equal, losses {loss:.1e}, adapters {weights:.1e}"))
    record(f"One run on every layout, {kind} (8 steps, against 1 process, budget auto, kept)", rows)


def test_every_move_between_world_sizes_is_the_straight_run(world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(world, tmp_path / "recipe.yaml", "plain")

    def request(name: str, stop: int | None) -> tuple[list[str], int | None]:
        return [str(recipe), "--runs-dir", str(tmp_path), "--name", name], stop

    for size in SIZES:
        requests = [request(f"{size}-to-{other}", 4) for other in SIZES]
        drive(size, [*requests, *([request("straight", None)] if size == 1 else [])], tmp_path)
    for one, other in itertools.product(SIZES, SIZES):
        marker = read_marker(RunDirectory(tmp_path / f"{one}-to-{other}"))
        assert marker == Marker("STOPPED", "preempted: at step 4 of 8")
    for size in SIZES:
        drive(size, [request(f"{other}-to-{size}", None) for other in SIZES], tmp_path)
    rows = []
    for one, other in itertools.product(SIZES, SIZES):
        moved = run_of(tmp_path / f"{one}-to-{other}")
        assert [moved.facts(step)["world_size"] for step in (4, 8)] == [one, other]
        loss, weights = apart(moved.directory.path, tmp_path / "straight")
        assert loss <= 1e-6
        assert weights <= 1e-6
        found = f"digests equal, losses {loss:.1e}, adapters {weights:.1e}"
        rows.append((f"{one} -> {other} processes", found))
    record("Moves between world sizes (stopped at step 4 of 8, against the straight run on 1 process)", rows)
