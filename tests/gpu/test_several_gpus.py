"""On two GPUs or more, over NCCL: the strategies, a run that moves between them, and what kills it.

pytest -m multigpu tests/gpu                    # minutes; all GPUs that are there, up to 8
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.launching import family
from launch.run.directory import RunDirectory, read_marker
from tests.helpers.distributed.drive import FIXED, TRIED
from tests.helpers.distributed.launching import (
    drive,
    launcher_of,
    published_steps,
    started,
    wait_until,
    workers,
)
from tests.helpers.distributed.recorded import (
    GPU_TOLERANCES,
    apart,
    assert_came_down,
    assert_the_same_to_the_byte,
    metrics_of,
    run_of,
    write_recipe,
    write_recipes_of_dtypes,
    write_tried_recipe,
)
from trainer.export import consolidate, merge

GPUS = min(8, torch.cuda.device_count())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs or more, here are {GPUS}"),
]
CHAIN = (
    *(("ddp", GPUS, 2), ("fsdp", max(2, GPUS // 4), 4), ("zero3", max(2, GPUS // 2), 6)),
    *(("zero2", GPUS, 7), ("single", 1, None)),
)
"""(strategy, GPUs, the step to stop at) of the run that moves."""
TRIED_UNDER = ("fsdp", "zero2", "zero3")
"""The strategies whose trial of the largest micro-batch leaves collectives out."""
STEPS = 60
PATIENCE_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def nccl() -> Iterator[None]:
    """Every rank has a GPU of its own; NVLink multicast stays off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_NVLS_ENABLE", "0")
        patch.setenv("OWN_GPUS", "1")
        yield


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<dtype>-<strategy>` on all GPUs, `<dtype>-single` on one, 8 steps with dropout; `chain`, which moves.

    `tried-<strategy>`, `fixed-<strategy>` on two: the largest micro-batch is tried, and comes down.
    """
    folder = tmp_path_factory.mktemp("several")
    recipes = write_recipes_of_dtypes(world, folder, checkpoint={"keep": 9})

    def request(recipe: Path, name: str, stop: int | None = None) -> tuple[list[str], int | None]:
        return [str(recipe), "--runs-dir", str(folder), "--name", name], stop

    tried = write_tried_recipe(world, folder / "tried.yaml", "bfloat16")
    launches: dict[tuple[str, int], list[tuple[list[str], int | None]]] = defaultdict(list)
    for strategy, processes, stop in CHAIN:
        launches[strategy, processes].append(request(recipes["float32"], "chain", stop))
        launches[strategy, 1 if processes == 1 else GPUS] += [
            request(recipe, f"{dtype}-{strategy}") for dtype, recipe in recipes.items()
        ]
        if strategy in TRIED_UNDER:
            launches[strategy, 2] += [request(tried, f"{name}-{strategy}") for name in (TRIED, FIXED)]
    for (strategy, processes), requests in launches.items():
        drive(processes, requests, folder, strategy=strategy)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("dtype", GPU_TOLERANCES)
def test_a_strategy_takes_the_steps_of_one_gpu(runs: Path, dtype: str, strategy: str) -> None:
    plan = run_of(runs / f"{dtype}-{strategy}").plan
    assert (plan.strategy, plan.world_size, plan.device) == (strategy, GPUS, "cuda")
    loss, weights = apart(runs / f"{dtype}-{strategy}", runs / f"{dtype}-single")
    print(f"{dtype}, {strategy} x {GPUS}: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= GPU_TOLERANCES[dtype]


@pytest.mark.parametrize("strategy", TRIED_UNDER)
def test_settings_come_down_in_a_trial_that_leaves_no_trace(runs: Path, strategy: str) -> None:
    tried, fixed = (runs / f"{name}-{strategy}" for name in (TRIED, FIXED))
    assert_came_down(tried, fixed)
    loss, weights = apart(tried, fixed)
    print(f"{strategy}: losses within {loss:.1e}, adapters within {weights:.1e}")
    assert loss <= GPU_TOLERANCES["bfloat16"]


def test_a_run_that_moves_between_strategies_and_gpus_is_the_straight_run(runs: Path) -> None:
    loss, weights = apart(runs / "chain", runs / "float32-single")
    print(f"{' -> '.join(f'{n} {s}' for s, n, _ in CHAIN)}: losses within {loss:.1e}, adapters {weights:.1e}")
    assert loss <= GPU_TOLERANCES["float32"]
    stops = [(step or 8, strategy, processes) for strategy, processes, step in CHAIN]
    for step, strategy, processes in stops:
        facts = run_of(runs / "chain").facts(step)
        assert (facts["strategy"], facts["world_size"]) == (strategy, processes)


def test_what_every_strategy_saved_becomes_one_adapter_and_merges(runs: Path, tmp_path: Path) -> None:
    for strategy, _, step in CHAIN:
        checkpoint = runs / "chain" / f"checkpoint-{step or 8}"
        output = tmp_path / f"{strategy}-adapter"
        assert consolidate.main([str(checkpoint), "--output", str(output)]) == 0
        merged = tmp_path / f"{strategy}-merged"
        assert merge.main([str(checkpoint), "--output", str(merged)]) == 0  # verifies what it wrote
    last = load_file(tmp_path / "single-adapter" / "adapter_model.safetensors")
    final = load_file(runs / "chain" / "adapter" / "adapter_model.safetensors")
    assert last.keys() == final.keys()
    assert all(torch.equal(last[name], final[name]) for name in final)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_killed_ranks_and_stopped_launchers_end_everywhere_and_the_run_goes_on_exactly(
    world: Path, tmp_path: Path, strategy: str
) -> None:
    changes = {
        "training": {"max_steps": STEPS, "deterministic": True},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 20},
    }
    recipe = write_recipe(world, tmp_path / "recipe.yaml", "nf4", **changes)
    run, log = RunDirectory(tmp_path / "struck"), tmp_path / "log"

    def command(name: str) -> list[str]:
        request = ["--strategy", strategy, "--gpus-per-node", str(GPUS), "--runs-dir", str(tmp_path)]
        return [sys.executable, "-m", "launch.cli.main", "run", str(recipe), *request, "--name", name]

    with started(command("straight"), log) as process:
        assert process.wait(timeout=300) == 0, log.read_text()
    # (the signal, the rank or None for the launcher, inside a save)
    for number, rank, in_save in (
        (signal.SIGKILL, 1, False),
        (signal.SIGKILL, 0, True),
        (signal.SIGTERM, None, False),
    ):
        with started(command("struck"), log) as process:
            strike(process.pid, run, number, rank, in_save, log)
    with started(command("struck"), log) as process:
        assert process.wait(timeout=300) == 0, log.read_text()
    assert_the_same_to_the_byte(run.path, tmp_path / "straight")


def strike(
    samestep: int, run: RunDirectory, number: signal.Signals, rank: int | None, in_save: bool, log: Path
) -> None:
    """Send the signal when this attempt has taken steps of its own; all of its processes must end in time."""
    newest = max(published_steps(run.path), default=0)

    def steps_again() -> bool:
        assert psutil.pid_exists(samestep), f"ended before it could be struck:\n{log.read_text()}"
        return run.metrics_file.exists() and len(metrics_of(run.path)) >= newest + 3

    wait_until(steps_again, pause=0.01)
    launcher = launcher_of(samestep)
    ranks, everybody = workers(launcher), family(samestep)
    assert len(ranks) == GPUS
    if in_save:
        wait_until(lambda: any(run.path.glob("checkpoint-*.partial")), pause=0)
    os.kill(launcher if rank is None else ranks[rank].pid, number)
    began = time.monotonic()
    _, alive = psutil.wait_procs(everybody, timeout=PATIENCE_S)
    where = "the launcher" if rank is None else f"rank {rank}{' in a save' if in_save else ''}"
    print(f"{number.name} to {where}: all ended after {time.monotonic() - began:.1f} s")
    assert not alive, f"{number.name} to {where} left {alive}:\n{log.read_text()}"
    marker = read_marker(run)
    if number == signal.SIGTERM:
        assert marker is not None
        assert marker.kind == "STOPPED"
    else:
        assert marker is None
