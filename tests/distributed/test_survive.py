"""`kill -9` of a rank, of all ranks and of the launcher, inside saves and between them: the same bytes in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.distributed.killing import Hit, survive
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import assert_the_same_to_the_byte, write_recipe

HITS = {
    1: (Hit("all", True, 1), Hit("rank", True, 1), Hit("launcher", False, 2)),
    2: (Hit("all", True, 1), Hit("launcher", False, 2)),
}


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_that_is_killed_again_and_again_is_the_straight_run_to_the_byte(
    world: Path, tmp_path: Path, processes: int
) -> None:
    changes = {
        "training": {"max_steps": 16},
        "checkpoint": {"every_steps": 1},
        "evaluation": {"every_steps": 5},
    }
    recipe = write_recipe(world, tmp_path / "recipe.yaml", "nf4" if processes == 1 else "plain", **changes)
    arguments = [str(recipe), "--runs-dir", str(tmp_path), "--name"]
    drive(processes, [([*arguments, "straight"], None)], tmp_path)
    log = tmp_path / "log"
    run, hits = tmp_path / "killed", HITS[processes]
    outcomes = survive(["trainer.train", *arguments, "killed"], run, processes, hits, log)
    inside = [folder for outcome in outcomes for folder in outcome.unpublished]
    assert inside
    assert all(f"{folder}: removed, it was never published" in log.read_text() for folder in inside)
    assert_the_same_to_the_byte(run, tmp_path / "straight")
