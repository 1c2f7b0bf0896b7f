"""Twenty `kill -9` in a row, of every kind, at least five of them inside a save: the same bytes in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed.killing import Hit, choose_hits, survive
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import assert_the_same_to_the_byte, sha256_of, write_recipe
from tests.long.results import record

pytestmark = pytest.mark.long

HITS, IN_SAVES, STEPS = 20, 8, 120
OF_A_RANK = (Hit("rank", False, 1), Hit("rank", True, 1), Hit("rank", False, 3), Hit("rank", True, 2))


@pytest.mark.parametrize(("processes", "kind"), [(1, "nf4"), (2, "plain"), (4, "plain")])
def test_twenty_kills_in_a_row_change_nothing(world: Path, tmp_path: Path, processes: int, kind: str) -> None:
    changes = {
        "training": {"max_steps": STEPS},
        "checkpoint": {"every_steps": 1},
        "evaluation": {"every_steps": 25},
    }
    recipe = write_recipe(world, tmp_path / "recipe.yaml", kind, **changes)
    arguments = [str(recipe), "--runs-dir", str(tmp_path), "--name"]
    drive(processes, [([*arguments, "straight"], None)], tmp_path)
    run, log = tmp_path / "killed", tmp_path / "log"
    hits = choose_hits(HITS, IN_SAVES, seed=processes)
    outcomes = survive(["trainer.train", *arguments, "killed"], run, processes, hits, log)
    inside = sum(bool(outcome.unpublished) for outcome in outcomes)
    assert inside >= 5
    assert log.read_text().count("removed, it was never published") == inside
    assert_the_same_to_the_byte(run, tmp_path / "straight")
    victims = ", ".join(
        f"{sum(outcome.hit.victim == victim for outcome in outcomes)} of {what}"
        for victim, what in (("rank", "one rank"), ("all", "all ranks"), ("launcher", "the launcher"))
    )
    name = "single" if processes == 1 else f"ddp on {processes} processes"
    steps = ", ".join(str(outcome.newest) for outcome in outcomes)
    record(
        f"`kill -9` {HITS} times in a row, {name} ({kind}, {STEPS} steps, a checkpoint after each)",
        [
            ("hits", f"{victims}; {inside} inside a save, by the unpublished folder that each left"),
            ("newest checkpoint after each", steps),
            ("adapter", f"sha256 {sha256_of(run)[:16]}..., as of the uninterrupted run"),
            ("every figure of every step and evaluation", "equal to the last digit"),
        ],
    )


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_ranks_that_are_killed_under_zero_change_nothing(world: Path, tmp_path: Path, strategy: str) -> None:
    changes = {
        "training": {"max_steps": 20},
        "checkpoint": {"every_steps": 1},
        "evaluation": {"every_steps": 5},
    }
    recipe = write_recipe(world, tmp_path / "recipe.yaml", "nf4", **changes)
    arguments = [str(recipe), "--runs-dir", str(tmp_path), "--name"]
    drive(2, [([*arguments, "straight"], None)], tmp_path, strategy=strategy)
    run, log = tmp_path / "killed", tmp_path / "log"
    outcomes = survive(["trainer.train", *arguments, "killed"], run, 2, OF_A_RANK, log, strategy)
    inside = sum(bool(outcome.unpublished) for outcome in outcomes)
    assert log.read_text().count("removed, it was never published") == inside
    assert_the_same_to_the_byte(run, tmp_path / "straight")
    steps = ", ".join(str(outcome.newest) for outcome in outcomes)
    record(
        f"`kill -9` of a rank {len(outcomes)} times in a row, {strategy} on 2 processes (nf4, 20 steps)",
        [
            ("hits", f"{len(outcomes)} of one rank; {inside} inside a save, by the unpublished folder"),
            ("newest checkpoint after each", steps),
            ("adapter", f"sha256 {sha256_of(run)[:16]}..., as of the uninterrupted run"),
            ("every figure of every step and evaluation", "equal to the last digit"),
        ],
    )
