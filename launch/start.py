"""From a request to an exit status on this machine: prepare, plan, write the run directory, launch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launch import run_identity
from launch.caches import base_is_there
from launch.changes import Change
from launch.children import call_module, tell
from launch.data_report import known_notes, summary
from launch.errors import ConfigError, InUseError, NoSpaceError, RunError
from launch.hardware import CPU_PROCESSES, compute_capability, gpu_memory, gpus_present
from launch.index import read_index
from launch.launching import ALONE, Machine, launch
from launch.plan import Plan, make_plan
from launch.recipe import Recipe
from launch.recipe_file import find_recipe, load_recipe
from launch.rules import refuse_topology
from launch.run_directory import (
    Marker,
    RunDirectory,
    clear_markers,
    clear_requests,
    hold_lock,
    is_done_at,
    make_folder,
    open_run,
    refuse_if_running,
    removed_on_failure,
)
from launch.runs import (
    Continuation,
    adopt,
    continue_run,
    old_plan,
    plan_to_keep,
    refuse_an_end_behind,
    refuse_another_identity,
    refuse_lost_checkpoints,
    write_request,
)
from launch.settings import parse_gpu_memory
from launch.survey import Checkpoint, newest_valid

if TYPE_CHECKING:
    from launch.index import Index
    from launch.run_identity import RunIdentity

# Of a run: checkpoints of a few adapters; more is for the machine's owner to see to.
NEEDED_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Topology:
    """How many processes of which strategy.

    `gpu_memory`: bytes of the smallest GPU, None where not known; `packages_here`: they use this Python's packages.
    """

    strategy: str
    nodes: int
    gpus_per_node: int
    device: str
    gpu_memory: int | None = None
    packages_here: bool = True

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
    allow: Sequence[str] = ()
    source: Path | None = None  # a checkpoint of another run
    topology: Topology | None = None  # of other machines than this one: then all of it is said
    machine: Machine = ALONE
    gpu_memory: str | None = None  # of each GPU, as the command line says it


@dataclass(frozen=True)
class PlannedRun:
    """A request with everything derived; nothing is written yet.

    `changed`: what differs from what was begun before, and is allowed to.
    """

    recipe: Recipe
    plan: Plan
    run: RunDirectory
    continuation: Continuation
    changed: tuple[Change, ...]


def choose_topology(strategy: str | None, nodes: int, gpus_per_node: int | None) -> Topology:
    """Fill in what was not said: the GPUs present (2 processes on a CPU), `single` for one, else `ddp`."""
    present = gpus_present()
    count = gpus_per_node if gpus_per_node is not None else (present or CPU_PROCESSES)
    if strategy == "single" and gpus_per_node is None:
        count = 1
    chosen = strategy if strategy is not None else ("single" if nodes * count == 1 else "ddp")
    return Topology(chosen, nodes, count, "cuda" if present else "cpu", gpu_memory() if present else None)


def for_gpus_of(topology: Topology, memory: str | None) -> Topology:
    """The topology with GPUs of a memory that the command line says, whatever this machine has. ConfigError."""
    if memory is None:
        return topology
    return replace(topology, device="cuda", gpu_memory=parse_gpu_memory(memory))


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
    else:  # `prepare` says it itself
        for line in summary(known_notes(recipe) or []):
            tell(f"{recipe.data.dataset}: {line}")
    if index is None:
        raise RunError(f"{recipe_file}: prepare ended without an index; run `samestep prepare {recipe_file}`")
    return index


def prepare(recipe_file: Path, overrides: Sequence[str], *, vision: bool = False) -> None:
    """Run `trainer.prepare` in a child, so that this process stays without torch; `vision`: its features too."""
    flags = [word for override in overrides for word in ("--set", override)]
    call_module("trainer.prepare", [str(recipe_file), *flags, *(["--vision"] if vision else [])])


@dataclass(frozen=True)
class CheckedRequest:
    """A request that nothing speaks against so far."""

    recipe_file: Path
    recipe: Recipe
    run: RunDirectory
    topology: Topology
    continuation: Continuation


def check_request(request: RunRequest) -> CheckedRequest:
    """Everything that can be refused at once, before data is prepared and without writing. ConfigError."""
    recipe_file = find_recipe(request.recipe)
    recipe = load_recipe(recipe_file, request.overrides)
    run = open_run(request.runs_dir, recipe.name if request.name is None else request.name)
    topology = request.topology or choose_topology(
        request.strategy, request.machine.nodes, request.gpus_per_node
    )
    if request.gpu_memory is not None:
        _refuse_memory_of_no_gpu(topology)
        topology = for_gpus_of(topology, request.gpu_memory)
    here = compute_capability() if request.topology is None and topology.device == "cuda" else None
    refuse_topology(
        recipe,
        topology.strategy,
        topology.nodes,
        topology.gpus_per_node,
        here,
        topology.device,
        topology.packages_here,
    )
    if request.topology is None:
        refuse_missing_gpus(topology)
    refuse_unwritable(run.path if run.path.is_dir() else run.path.parent)
    refuse_if_running(run)
    source = request.source.expanduser().resolve() if request.source else None
    if request.fresh and source and source.is_relative_to(run.path.resolve()):
        raise ConfigError(
            f"--from: {request.source} lies in the run that --fresh moves aside ({run.path}); choose another --name"
        )
    continuation = continue_run(_begun(request, run), recipe, request.allow, request.source)
    return CheckedRequest(recipe_file, recipe, run, topology, continuation)


def _refuse_memory_of_no_gpu(topology: Topology) -> None:
    if topology.device == "cpu":
        raise ConfigError(
            "--gpu-memory: a run takes the GPUs that are here, and there is none; leave it out, or plan for others "
            "with `samestep plan`"
        )


def _begun(request: RunRequest, run: RunDirectory) -> RunDirectory:
    """The run that the request goes on with: none of that name with `--fresh`."""
    return RunDirectory(run.path / ".fresh" / run.name) if request.fresh else run


def plan_run(request: RunRequest) -> PlannedRun:
    """Check a request against everything that is known, and derive its plan. Writes to the cache only."""
    checked = check_request(request)
    run, recipe, continuation = checked.run, checked.recipe, checked.continuation
    index = load_index(checked.recipe_file, recipe, request.overrides)
    begun, source = _begun(request, run), continuation.source
    allowed = continuation.allowed if source else request.allow
    identity = run_identity.find_identity(recipe, index)
    others = refuse_another_identity(begun, identity, allowed, source)
    topology = checked.topology
    hardware = {name: getattr(topology, name) for name in ("strategy", "nodes", "gpus_per_node", "device")}
    before = plan_to_keep(
        begun, recipe, {**hardware, "gpu_memory": topology.gpu_memory or 0}, index.fingerprint
    )
    plan = plan_of(recipe, index, topology, run.name, continuation, before, identity)
    refuse_an_end_behind(begun, plan.max_steps, source)
    return PlannedRun(recipe, plan, run, continuation, (*continuation.changed, *others))


@contextmanager
def claim(planned: PlannedRun, request: RunRequest) -> Iterator[None]:
    """Keep the run's name from a second `samestep run`, which may have come first while data was prepared."""
    planned.run.path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(planned.run.path.parent, f".{planned.run.name}.lock"):
        if check_request(request).continuation != planned.continuation:
            raise ConfigError(
                f"{planned.run.path}: went on while this was planned; give the same command again"
            )
        yield


def plan_of(
    recipe: Recipe,
    index: Index,
    topology: Topology,
    name: str,
    continuation: Continuation = Continuation(),  # noqa: B008 - frozen
    before: Plan | None = None,
    identity: RunIdentity | None = None,
) -> Plan:
    """The plan of a recipe on a topology, going on with what was begun before, with the settings of `before`."""
    return make_plan(
        recipe,
        index,
        strategy=topology.strategy,
        nodes=topology.nodes,
        gpus_per_node=topology.gpus_per_node,
        device=topology.device,
        name=name,
        begin=continuation.begin,
        allowed=continuation.allowed,
        started_from=continuation.started_from,
        gpu_memory=topology.gpu_memory,
        before=before,
        packages_here=topology.packages_here,
        identity=identity,
        samples_digest=continuation.samples_digest,
    )


def is_done(planned: PlannedRun) -> bool:
    """This run, whose recipe and data may go on, has taken its last step already, and its adapter is there."""
    return is_done_at(planned.run, planned.plan.max_steps)


def outlook(planned: PlannedRun, request: RunRequest) -> str:
    """In one line, where the request would begin, go on, or find the run done. Writes nothing.

    Raises CheckpointError where training would be refused: the run has a result, and no checkpoint to go on from.
    """
    run, last = planned.run, planned.plan.max_steps
    if request.fresh:
        aside = "the older run is moved aside, and " if run.path.exists() else ""
        return f"{run.path}: {aside}trained from step 0 to {last:,}"
    if is_done(planned):
        return f"{run.path}: done already, step {last:,} of {last:,}, adapter in {run.adapter}; nothing to change"
    newest = _find_beginning(planned)
    if newest is not None:
        return f"{run.path}: goes on from {newest.folder.name}, step {newest.step:,} of {last:,}"
    if (source := planned.continuation.source) is not None:
        return f"{run.path}: begins with {source}, to step {last:,}"
    return f"{run.path}: begins at step 0 of {last:,}"


def _find_beginning(planned: PlannedRun) -> Checkpoint | None:
    """The checkpoint that the run would go on from; None: it begins. CheckpointError as training would raise it."""
    newest, passed_over = newest_valid(planned.run.path)
    if newest is None and planned.continuation.source is None:
        refuse_lost_checkpoints(planned.run, passed_over, planned.plan.begin.step)
    return newest


def refuse_unwritable(folder: Path) -> None:
    """ConfigError unless a run can be written below `folder`, which may not exist yet. Writes nothing."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{folder}: {place} is a file, no folder; choose another --runs-dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written; give permission, or choose another --runs-dir")
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise NoSpaceError(
            f"{folder}: no space left for a run ({free / 2**20:,.0f} MB free, "
            f"{NEEDED_BYTES / 2**20:,.0f} MB needed); make room, or choose another --runs-dir"
        )


@contextmanager
def moved_aside(run: RunDirectory, fresh: bool) -> Iterator[Path | None]:
    """With `fresh`, rename an existing run to <name>.<timestamp>; back, when the block fails and leaves no other.

    Gives its name meanwhile; None where nothing was in the way.
    """
    if not fresh or not run.path.exists():
        yield None
        return
    old = run.path.with_name(f"{run.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    run.path.rename(old)
    try:
        yield old
    except BaseException:
        if not run.path.exists():
            old.rename(run.path)
        raise


def execute(planned: PlannedRun, machine: Machine = ALONE) -> Marker:
    """Write the run directory and train; returns and raises as `launch`."""
    run = planned.run
    new = make_folder(run)
    with removed_on_failure(run, new), hold_lock(run.path):  # a plain `accelerate launch` may have come first
        _find_beginning(planned)
        clear_markers(run)
        clear_requests(run)
        write_request(run, planned.recipe, planned.plan)
        if planned.continuation.source is not None:
            adopt(planned.continuation.source, run)
    try:
        return launch(planned.plan, run, machine)
    except ConfigError as refused:
        others_take_it = isinstance(refused, InUseError) or machine.nodes > 1  # the others read there why
        if new and not others_take_it and not run.has_work():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def execute_twice(planned: PlannedRun, request: RunRequest) -> Marker:
    """As `execute`; once more, from the newest checkpoint, when a GPU ran out of memory and smaller settings are known.

    With several machines there is no second time: the others would have to be told.
    """
    try:
        return execute(planned, request.machine)
    except RunError:
        smaller = old_plan(planned.run)
        if (
            request.machine.nodes > 1
            or smaller is None
            or smaller.out_of_memory <= planned.plan.out_of_memory
        ):
            raise
    tell("a GPU ran out of memory; once more, with settings that need less of it")
    return execute(plan_run(replace(request, fresh=False)), request.machine)


def find_run(name: str, runs_dir: Path, whole: bool = True) -> RunDirectory:
    """A run by name below `runs_dir`, or by path. ConfigError when there is none.

    `whole`: with its recipe and plan; without, a folder that has a checkpoint will do.
    """
    path = Path(name).expanduser()
    candidates = [runs_dir.expanduser() / name, path] if len(path.parts) == 1 else [path]
    for candidate in candidates:
        run = RunDirectory(candidate.absolute())
        if run.recipe_file.is_file() and run.plan_file.is_file():
            return run
        if not whole and any(run.path.glob("checkpoint-*")):
            return run
    places = ", ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"{name}: no such run ({places}); give the name or the folder of a run, see --runs-dir")
