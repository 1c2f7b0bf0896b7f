"""Several machines by hand, as a user starts them: two on loopback with two processes each are one with four."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.local.accelerate_command import free_port
from launch.run.directory import Marker, RunDirectory, read_marker
from tests.helpers.distributed.launching import (
    drive,
    interrupt,
    machine_command,
    published_steps,
    started,
    wait_until,
)
from tests.helpers.distributed.recorded import apart, metrics_of, run_of, write_recipe

STEPS = 40


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its run on four processes of one machine."""
    folder = tmp_path_factory.mktemp("machines")
    recipe = write_recipe(
        world,
        folder / "recipe.yaml",
        "plain",
        training={"max_steps": STEPS},
        evaluation={"every_steps": 100},
        checkpoint={"every_steps": 100},
    )
    drive(4, [([str(recipe), "--runs-dir", str(folder), "--name", "one"], None)], folder)
    return folder


def _command(place: Path, rank: int, port: int) -> list[str]:
    options = ["--name", "two", "--strategy", "ddp", "--gpus-per-node", "2"]
    return machine_command(place / "recipe.yaml", options, rank=rank, nodes=2, port=port)


@pytest.mark.long  # of the default tiers, `make test-slurm` has two machines
def test_two_machines_take_the_steps_of_one_and_either_can_stop_both(place: Path, tmp_path: Path) -> None:
    run, port = RunDirectory(place / "two"), free_port()
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        started(_command(place, 1, port), second) as other,
        started(_command(place, 0, port), first) as process,
    ):
        wait_until(lambda: run.metrics_file.exists() and len(metrics_of(run.path)) > 0, pause=0.01)
        interrupt(other)  # Ctrl-C on the machine that does not write the run
        assert process.wait(timeout=90) == 0, first.read_text()
        assert other.wait(timeout=90) == 0, second.read_text()
    step = max(published_steps(run.path))
    assert read_marker(run) == Marker("STOPPED", f"user: at step {step} of {STEPS}")
    assert step < STEPS

    port = free_port()
    with (
        started(_command(place, 1, port), second) as other,  # finds the plan of the attempt before
        started(_command(place, 0, port), first) as process,
    ):
        assert process.wait(timeout=120) == 0, first.read_text()
        assert other.wait(timeout=120) == 0, second.read_text()
    plan = run_of(run.path).plan
    assert (plan.nodes, plan.gpus_per_node, plan.world_size) == (2, 2, 4)
    loss, weights = apart(run.path, place / "one")
    print(f"2 machines x 2 processes against 1 x 4: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= 1e-6
    assert weights <= 1e-6
    for log in (first, second):
        assert "Traceback" not in log.read_text()
    with started(_command(place, 1, free_port()), second) as other:  # done: machine 0 would start nothing
        assert other.wait(timeout=30) == 0
    assert f"done (step {STEPS})" in second.read_text()
