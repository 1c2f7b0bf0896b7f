"""From a request to an exit status on this machine: prepare, plan, write the run directory, launch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launch.accelerate import Layout, cpu_threads_of, free_port, launch_command
from launch.children import ChildError, call_module, wait_for
from launch.errors import ConfigError, RunError
from launch.hardware import CPU_PROCESSES, first_visible_gpu, gpus_present
from launch.index import base_is_there, read_index
from launch.plan import Plan, make_plan
from launch.recipe import Recipe, find_recipe, load_recipe
from launch.resources import resource
from launch.rules import refuse_topology
from launch.run_directory import (
    RunDirectory,
    clear_markers,
    hold_lock,
    open_run,
    read_marker,
    refuse_if_running,
)
from launch.runs import refuse_another_dataset, refuse_another_recipe, write_request

if TYPE_CHECKING:
    from launch.index import Index

NEEDED_BYTES = (
    100 * 2**20
)  # of a run: checkpoints of a few adapters; more is for the machine's owner to see to


EVALUATED_MODELS = ("base", "adapter", "shuffled", "merged")


@dataclass(frozen=True)
class Topology:
    """How many processes of which strategy."""

    strategy: str
    nodes: int
    gpus_per_node: int
    device: str

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class RunRequest:
    """What `samestep run` was asked for."""

    recipe: str
    overrides: Sequence[str]
    strategy: str | None
    gpus_per_node: int | None
    name: str | None
    runs_dir: Path
    fresh: bool


@dataclass(frozen=True)
class PlannedRun:
    """A request with everything derived; nothing is written yet."""

    recipe: Recipe
    plan: Plan
    run: RunDirectory

    def command(self, port: int) -> list[str]:
        """argv of the launcher."""
        return trainer_command(
            self.plan, "trainer.train", ["--run-dir", str(self.run.path), "--marker-decides"], port
        )


def choose_topology(strategy: str | None, nodes: int, gpus_per_node: int | None) -> Topology:
    """Fill in what was not said: the GPUs present (2 processes on a CPU), `single` for one, else `ddp`."""
    present = gpus_present()
    count = gpus_per_node if gpus_per_node is not None else (present or CPU_PROCESSES)
    if strategy == "single" and gpus_per_node is None:
        count = 1
    chosen = strategy or ("single" if nodes * count == 1 else "ddp")
    return Topology(chosen, nodes, count, "cuda" if present else "cpu")


def refuse_missing_gpus(topology: Topology) -> None:
    """ConfigError when this machine has fewer GPUs than processes are to be started, or none are."""
    present = gpus_present()
    if topology.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node: {topology.gpus_per_node} starts nothing; give at least 1")
    if topology.device == "cuda" and topology.gpus_per_node > present:
        raise ConfigError(
            f"--gpus-per-node: this machine shows fewer GPUs ({present} < {topology.gpus_per_node}); "
            f"ask for at most {present}, or see CUDA_VISIBLE_DEVICES"
        )


def load_index(recipe_file: Path, recipe: Recipe, overrides: Sequence[str]) -> Index:
    """The prepared index; starts `trainer.prepare` when it is missing or stale, or the base model is not there."""
    index = read_index(recipe)
    if index is None or not base_is_there(recipe):
        prepare(recipe_file, overrides)
        index = read_index(recipe)
    if index is None:
        raise RunError(f"{recipe_file}: prepare ended without an index; run `samestep prepare {recipe_file}`")
    return index


def prepare(recipe_file: Path, overrides: Sequence[str]) -> None:
    """Run `trainer.prepare` in a child, so that this process stays without torch."""
    flags = [word for override in overrides for word in ("--set", override)]
    call_module("trainer.prepare", [str(recipe_file), *flags])


def check_request(request: RunRequest) -> tuple[Path, Recipe, RunDirectory, Topology]:
    """Everything that can be refused at once, before data is prepared and without writing. ConfigError."""
    recipe_file = find_recipe(request.recipe)
    recipe = load_recipe(recipe_file, request.overrides)
    run = open_run(request.runs_dir, request.name or recipe.name)
    topology = choose_topology(request.strategy, 1, request.gpus_per_node)
    refuse_topology(recipe, topology.strategy, topology.nodes, topology.gpus_per_node)
    refuse_missing_gpus(topology)
    refuse_unwritable(run.path.parent)
    refuse_if_running(run)
    if not request.fresh:
        refuse_another_recipe(run, recipe)
    return recipe_file, recipe, run, topology


def plan_run(request: RunRequest) -> PlannedRun:
    """Check a request against everything that is known, and derive its plan. Writes to the cache only."""
    recipe_file, recipe, run, topology = check_request(request)
    index = load_index(recipe_file, recipe, request.overrides)
    plan = plan_of(recipe, index, topology, run.name)
    if not request.fresh:
        refuse_another_dataset(run, plan)
    return PlannedRun(recipe, plan, run)


@contextmanager
def claim(planned: PlannedRun, request: RunRequest) -> Iterator[None]:
    """Keep the run's name from a second `samestep run`, which may have come first while data was prepared."""
    planned.run.path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(planned.run.path.parent, f".{planned.run.name}.lock"):
        check_request(request)
        yield


def plan_of(recipe: Recipe, index: Index, topology: Topology, name: str) -> Plan:
    """The plan of a recipe on a topology."""
    return make_plan(
        recipe,
        index,
        strategy=topology.strategy,
        nodes=topology.nodes,
        gpus_per_node=topology.gpus_per_node,
        device=topology.device,
        name=name,
    )


def is_done(planned: PlannedRun) -> bool:
    """This run, whose recipe and data were found to be the same, has ended already, and its adapter is there."""
    run, marker = planned.run, read_marker(planned.run)
    done = marker is not None and marker.kind == "DONE"
    return done and (run.adapter / "adapter_config.json").is_file()


def refuse_unwritable(folder: Path) -> None:
    """ConfigError unless a run can be written below `folder`, which may not exist yet. Writes nothing."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written; give permission, or choose another --runs-dir")
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise ConfigError(
            f"{folder}: no space left for a run ({free / 2**20:,.0f} MB free, "
            f"{NEEDED_BYTES / 2**20:,.0f} MB needed); make room, or choose another --runs-dir"
        )


def move_aside(run: RunDirectory) -> Path | None:
    """Rename an existing run to <name>.<timestamp>; None when there was none."""
    if not run.path.exists():
        return None
    old = run.path.with_name(f"{run.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    run.path.rename(old)
    return old


def execute(planned: PlannedRun) -> None:
    """Write the run directory, launch, wait, and believe the marker: DONE or STOPPED is success.

    The launcher's status is no evidence: accelerate 1.15 returns 1 after workers that all ended well.
    Raises ConfigError for REFUSED, RunError when there is no marker, KeyboardInterrupt after a Ctrl-C.
    """
    run = planned.run
    write_request(run, planned.recipe, planned.plan)
    clear_markers(run)
    ended = wait_for(planned.command(free_port()), child_environment(planned.plan))
    marker = read_marker(run)
    if marker is not None and marker.kind in ("DONE", "STOPPED"):
        return
    if ended.interrupted:
        raise KeyboardInterrupt
    if marker is None:
        refuse_if_running(
            run
        )  # a trainer that outlived its `samestep run`: ours gave way to it without a marker
    if marker is not None:
        raise ConfigError(marker.text or f"{run.path}: refused without a reason; see the words above")
    raise RunError(
        f"{run.path}: ended before it was done; see the words above, the same command goes on "
        "from the newest checkpoint"
    )


def trainer_command(layout: Layout, module: str, arguments: Sequence[str], port: int) -> list[str]:
    """argv that starts a trainer module on all processes of a layout."""
    return launch_command(
        layout,
        config_file=resource("accelerate_configs", f"{layout.strategy}.yaml"),
        module=module,
        module_args=arguments,
        port=port,
        cpu_threads=cpu_threads_of(layout),
    )


def child_environment(layout: Layout) -> dict[str, str]:
    """The environment of the launcher. One process sees one GPU: Trainer would spread over all it sees."""
    extra = (
        {"CUDA_VISIBLE_DEVICES": first_visible_gpu()}
        if layout.strategy == "single" and layout.device == "cuda"
        else {}
    )
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **extra}


def find_run(name: str, runs_dir: Path) -> RunDirectory:
    """A run by name below `runs_dir`, or by path. ConfigError when there is none."""
    path = Path(name).expanduser()
    candidates = [runs_dir.expanduser() / name, path] if len(path.parts) == 1 else [path]
    for candidate in candidates:
        run = RunDirectory(candidate.absolute())
        if run.recipe_file.is_file() and run.plan_file.is_file():
            return run
    places = ", ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"{name}: no such run ({places}); give the name or the folder of a run, see --runs-dir")


def refuse_missing_models(run: RunDirectory, models: Sequence[str]) -> None:
    """ConfigError for every model that the run does not have (yet)."""
    problems = []
    if {"adapter", "shuffled"} & {*models} and not (run.adapter / "adapter_config.json").is_file():
        problems.append(f"{run.adapter}: no adapter yet; `samestep run` writes it when the run is done")
    if "merged" in models and not (run.merged / "config.json").is_file():
        problems.append(f"{run.merged}: no merged model yet; make it with `samestep merge {run.path}`")
    if unknown := [model for model in models if model not in EVALUATED_MODELS]:
        problems.append(f"--models: unknown {', '.join(unknown)}; choose of {', '.join(EVALUATED_MODELS)}")
    if problems:
        raise ConfigError(problems)


def evaluate(
    run: RunDirectory, models: Sequence[str], arguments: Sequence[str], gpus_per_node: int | None
) -> None:
    """Start `trainer.evaluation.generate` on replicas. ChildError when it fails."""
    topology = choose_topology(None, 1, gpus_per_node)
    refuse_missing_gpus(topology)
    refuse_missing_models(run, models)
    command = trainer_command(
        topology,
        "trainer.evaluation.generate",
        ["--run-dir", str(run.path), "--models", ",".join(models), *arguments],
        free_port(),
    )
    ended = wait_for(command, child_environment(topology))
    if ended.interrupted:
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError("evaluate", ended.status)


def merge(source: str, output: Path | None, dtype: str | None, base: str | None, runs_dir: Path) -> bool:
    """Start `trainer.checkpoint.merge`, then the comparison of its result. ChildError when either fails.

    Returns False when the result could not be compared: an adapter outside a run has no data.
    """
    named = runs_dir.expanduser() / source
    folder = named if len(Path(source).parts) == 1 and named.is_dir() else Path(source).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{source}: no such run or folder ({named}, {folder}); see --runs-dir")
    if output is None:
        if not RunDirectory(folder).recipe_file.is_file():
            raise ConfigError(f"--output: missing ({folder} is not a run); give the folder to write")
        output = RunDirectory(folder).merged
    named_base = [] if base is None else ["--base", base]
    flags = [*named_base] if dtype is None else [*named_base, "--dtype", dtype]
    call_module("trainer.checkpoint.merge", [str(folder), "--output", str(output), *flags])
    if not any(RunDirectory(place).recipe_file.is_file() for place in (folder, folder.parent)):
        return False
    call_module("trainer.evaluation.compare", ["--source", str(folder), "--merged", str(output), *named_base])
    return True
