"""Sharded checkpoints: written under every strategy, read under every other on the same and another world size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from launch.planning.plan import Plan
from tests.helpers.distributed.killing import choose_hits, survive
from tests.helpers.distributed.launching import drive
from tests.helpers.distributed.recorded import (
    apart,
    assert_the_same_to_the_byte,
    run_of,
    sha256_of,
    write_recipe,
)
from tests.long.results import record
from trainer.embedded.tiny_model import random_tiny
from trainer.formats.detect import import_checkpoint

pytestmark = pytest.mark.long

WRITERS = (("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2))
READERS = (*WRITERS, ("ddp", 4), ("fsdp", 3), ("zero2", 3), ("zero3", 4))
MOVES = {
    "small": list(itertools.product(WRITERS, READERS)),
    "large": [
        (one, other) for one in WRITERS for other in READERS if other in (one, ("fsdp", 3), ("zero3", 4))
    ],
}
"""LoRA of rank 8 on two modules of a layer; `all-linear` of rank 64 on the shape of the embedded model."""


def _named(layout: tuple[str, int]) -> str:
    return f"{layout[0]}-{layout[1]}"


def _moved(one: tuple[str, int], other: tuple[str, int]) -> str:
    return f"{_named(one)}-to-{_named(other)}"


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<kind>-<writer>` straight, `<kind>-<writer>-to-<reader>` moved at step 4 of 8; a launch a layout and half."""
    folder = tmp_path_factory.mktemp("sharded")
    random_tiny(folder / "base", hidden=128)
    checkpoint = {"every_steps": 4, "keep": 9, "format": "sharded"}
    large = {
        "model": {"name_or_path": str(folder / "base")},
        "lora": {"r": 64, "lora_alpha": 64, "target_modules": "all-linear"},
    }
    recipes = {
        kind: write_recipe(world, folder / f"{kind}.yaml", "nf4", checkpoint=checkpoint, **changes)
        for kind, changes in zip(MOVES, ({}, large), strict=True)
    }

    def request(kind: str, name: str, stop: int | None) -> tuple[list[str], int | None]:
        return [str(recipes[kind]), "--runs-dir", str(folder), "--name", f"{kind}-{name}"], stop

    moves = [(kind, one, other) for kind, pairs in MOVES.items() for one, other in pairs]
    for writer in WRITERS:
        straight = [request(kind, _named(writer), None) for kind in MOVES]
        moved = [request(kind, _moved(one, other), 4) for kind, one, other in moves if one == writer]
        drive(writer[1], [*straight, *moved], folder, limit=1200, strategy=writer[0])
    for reader in READERS:
        moved = [request(kind, _moved(one, other), None) for kind, one, other in moves if other == reader]
        drive(reader[1], moved, folder, limit=1200, strategy=reader[0])
    return folder


@pytest.mark.parametrize("kind", MOVES)
def test_every_layout_goes_on_from_the_shards_of_every_strategy(runs: Path, kind: str) -> None:
    rows = []
    straight = runs / f"{kind}-single-1"
    for writer, reader in MOVES[kind]:
        run = run_of(runs / f"{kind}-{_moved(writer, reader)}")
        assert [run.facts(step)["form"] for step in (4, 8)] == ["sharded", "sharded"]
        layouts = [(run.facts(step)["strategy"], run.facts(step)["world_size"]) for step in (4, 8)]
        assert layouts == [writer, reader]
        loss, weights = apart(run.directory.path, straight)
        assert loss <= 1e-6
        assert weights <= 1e-6
        found = f"digests equal, losses {loss:.1e}, adapters {weights:.1e}"
        if writer == reader:
            assert_the_same_to_the_byte(run.directory.path, runs / f"{kind}-{_named(writer)}")
            found = f"sha256 {sha256_of(run.directory.path)[:16]}..., as uninterrupted; every figure equal"
        rows.append((f"{_named(writer)} -> {_named(reader)}", found))
    what = "r 8, q_proj and v_proj" if kind == "small" else "r 64, all-linear, the embedded model's shape"
    heading = f"Sharded checkpoints moved at step 4 of 8 (nf4, {what}; against the straight run on 1 process)"
    record(heading, rows)


def test_the_ranks_share_the_writing(runs: Path) -> None:
    rows = []
    for strategy, size in (*WRITERS, ("fsdp", 3), ("zero3", 4)):
        name = f"single-1-to-{strategy}-{size}" if size > 2 else f"{strategy}-{size}"
        last = runs / f"large-{name}" / "checkpoint-8"
        parts = [
            *last.glob("shards/__*.distcp"),
            *last.glob("shards/global_step8/*_optim_states.pt"),
        ]
        sizes = sorted(file.stat().st_size for file in parts)
        assert len(sizes) == size
        assert sizes[-1] < 1.1 * sizes[0]
        state = sum(tensor.nbytes for tensor in import_checkpoint(last).optimizer_state.values()) * 1.5
        rows.append(
            (
                f"{strategy} on {size}",
                f"state {state / 1e6:.2f} MB; parts {[f'{s / 1e6:.2f}' for s in sizes]} MB",
            )
        )
    record(
        "What each rank writes of a sharded checkpoint (r 64, all-linear, the embedded model's shape)", rows
    )


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("zero3", 2)])
def test_kills_inside_sharded_saves_change_nothing(
    world: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    changes = {
        "training": {"max_steps": 60},
        "checkpoint": {"every_steps": 1, "format": "sharded"},
        "evaluation": {"every_steps": 25},
    }
    recipe = write_recipe(world, tmp_path / "recipe.yaml", "plain", **changes)
    arguments = [str(recipe), "--runs-dir", str(tmp_path), "--name"]
    drive(processes, [([*arguments, "straight"], None)], tmp_path, strategy=strategy)
    run, log = tmp_path / "killed", tmp_path / "log"
    hits = choose_hits(8, 6, seed=processes)
    outcomes = survive(["trainer.train", *arguments, "killed"], run, processes, hits, log, strategy)
    inside = sum(bool(outcome.unpublished) for outcome in outcomes)
    assert inside >= 2
    assert_the_same_to_the_byte(run, tmp_path / "straight")
    assert Plan.from_json((run / "plan.json").read_text()).strategy == strategy
    record(
        f"`kill -9` 8 times in a row, sharded checkpoints of {strategy} on {processes} processes",
        [
            ("hits", f"{inside} of 8 inside a save, by the unpublished folder that each left"),
            ("newest checkpoint after each", ", ".join(str(outcome.newest) for outcome in outcomes)),
            ("adapter", f"sha256 {sha256_of(run)[:16]}..., as of the uninterrupted run"),
        ],
    )
