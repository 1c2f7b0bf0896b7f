"""Three machines on loopback with a process each are one with three."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.local.accelerate_command import free_port
from tests.helpers.distributed.launching import drive, machine_command, started
from tests.helpers.distributed.recorded import apart, run_of, write_recipe
from tests.long.results import record

pytestmark = pytest.mark.long


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_three_machines_take_the_steps_of_one(world: Path, tmp_path: Path, strategy: str) -> None:
    recipe = write_recipe(world, tmp_path / "recipe.yaml", "nf4")
    drive(
        3, [([str(recipe), "--runs-dir", str(tmp_path), "--name", "one"], None)], tmp_path, strategy=strategy
    )
    port, logs = free_port(), [tmp_path / f"machine-{rank}" for rank in range(3)]
    options = ["--name", "three", "--strategy", strategy, "--gpus-per-node", "1"]
    with ExitStack() as held:
        machines = [
            held.enter_context(
                started(machine_command(recipe, options, rank=rank, nodes=3, port=port), logs[rank])
            )
            for rank in (2, 1, 0)
        ]
        statuses = [machine.wait(timeout=300) for machine in machines]
    assert statuses == [0, 0, 0], "\n".join(log.read_text() for log in logs)
    plan = run_of(tmp_path / "three").plan
    assert (plan.strategy, plan.nodes, plan.gpus_per_node) == (strategy, 3, 1)
    loss, weights = apart(tmp_path / "three", tmp_path / "one")
    assert loss <= 1e-6
    assert weights <= 1e-6
    record(
        f"Three machines on loopback, {strategy} (nf4, 8 steps)",
        [("3 x 1 processes against 1 x 3", f"digests equal, losses {loss:.1e}, adapters {weights:.1e}")],
    )
