"""Every strategy on every world size is the run on one process, and so is every move from one strategy to another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.run.directory import Marker, RunDirectory, read_marker
from launch.strategies import STRATEGIES
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import apart, evaluations_of, run_of, write_recipe
from tests.long.results import record

pytestmark = pytest.mark.long

KINDS = {"plain": 1e-6, "nf4": 1e-5}
SIZES = (1, 2, 4)
LAYOUTS = (("single", 1), *itertools.product(tuple(STRATEGIES)[1:], SIZES))
"""(strategy, processes)"""


@dataclass(frozen=True)
class Move:
    """A run that stops at step 4 under one layout and goes on to step 8 under another."""

    begins: tuple[str, int]
    ends: tuple[str, int]

    @property
    def name(self) -> str:
        return "-".join(map(str, ("move", *self.begins, *self.ends)))


def _size(strategy: str, turn: int) -> int:
    return 1 if STRATEGIES[strategy].is_one_process else SIZES[turn % len(SIZES)]


MOVES = tuple(
    # Another size after the move: the next, or where the order of the two is turned round the one after that.
    Move((one, _size(one, i + j)), (other, _size(other, i + j + (2 if i > j else 1))))
    for (i, one), (j, other) in itertools.product(enumerate(STRATEGIES), repeat=2)
)


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>-<strategy>-<processes>` of every layout, 8 steps; and every move, in two launches a layout."""
    folder = tmp_path_factory.mktemp("strategies")
    recipes = {kind: write_recipe(world, folder / f"{kind}.yaml", kind) for kind in KINDS}

    def launch(layout: tuple[str, int], requests: Sequence[tuple[str, str, int | None]]) -> None:
        asked = [
            ([str(recipes[kind]), "--runs-dir", str(folder), "--name", name], stop)
            for kind, name, stop in requests
        ]
        drive(layout[1], asked, folder, limit=600, strategy=layout[0])

    for layout in LAYOUTS:
        cells = [(kind, f"{kind}-{layout[0]}-{layout[1]}", None) for kind in KINDS]
        launch(layout, [*cells, *(("nf4", move.name, 4) for move in MOVES if move.begins == layout)])
    for move in MOVES:
        assert read_marker(RunDirectory(folder / move.name)) == Marker("STOPPED", "preempted: at step 4 of 8")
    for layout in LAYOUTS:
        if arriving := [("nf4", move.name, None) for move in MOVES if move.ends == layout]:
            launch(layout, arriving)
    return folder


@pytest.mark.parametrize(("kind", "tolerance"), KINDS.items())
def test_every_strategy_on_every_world_size_takes_the_steps_of_one_process(
    runs: Path, kind: str, tolerance: float
) -> None:
    rows = []
    straight = runs / f"{kind}-single-1"
    expected = evaluations_of(straight)
    assert [line["step"] for line in expected] == [2, 4, 6, 8]
    for strategy, size in LAYOUTS:
        run = runs / f"{kind}-{strategy}-{size}"
        plan = run_of(run).plan
        assert (plan.strategy, plan.world_size) == (strategy, size)
        loss, weights = apart(run, straight)
        assert loss <= tolerance
        assert weights <= tolerance
        found = evaluations_of(run)
        assert [(line["step"], line["samples"]) for line in found] == [
            (line["step"], line["samples"]) for line in expected
        ]
        evaluated = max(
            abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(found, expected, strict=True)
        )
        assert evaluated <= tolerance
        rows.append(
            (
                f"{strategy}, world size {size}",
                f"digests equal, losses {loss:.1e}, adapters {weights:.1e}, evaluations {evaluated:.1e}",
            )
        )
    record(f"One run under every strategy, {kind} (8 steps, against single)", rows)


def test_every_move_between_strategies_is_the_straight_run(runs: Path) -> None:
    assert len({(move.begins[0], move.ends[0]) for move in MOVES}) == len(STRATEGIES) ** 2
    rows = []
    for move in MOVES:
        moved = run_of(runs / move.name)
        facts = [moved.facts(step) for step in (4, 8)]
        assert [(fact["strategy"], fact["world_size"]) for fact in facts] == [move.begins, move.ends]
        loss, weights = apart(moved.directory.path, runs / "nf4-single-1")
        assert loss <= 1e-6
        assert weights <= 1e-6
        (one, size), (other, next_size) = move.begins, move.ends
        rows.append(
            (
                f"{one} on {size} -> {other} on {next_size}",
                f"digests equal, losses {loss:.1e}, adapters {weights:.1e}",
            )
        )
    record(
        "Moves between strategies (nf4, stopped at step 4 of 8, against the straight run under single)", rows
    )
