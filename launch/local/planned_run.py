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

from launch.checkpoints.scan import Checkpoint, newest_valid
from launch.console import log_stderr
from launch.errors import ConfigError, NoSpaceError, RunError
from launch.hardware import compute_capability
from launch.inputs import identity as run_identity
from launch.inputs.caches import base_is_there
from launch.inputs.data_report import known_notes, summarize_notes
from launch.inputs.dataset_index import read_index
from launch.local.launcher import ALONE, Machine
from launch.local.topology import choose_topology, for_gpus_of, refuse_what_is_not_here
from launch.planning.plan import Plan
from launch.planning.topology import Topology
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import find_recipe, load_recipe
from launch.recipe.schema import Recipe
from launch.rules.checks import refuse_topology
from launch.run.changes import Change, changes
from launch.run.continuation import (
    Continuation,
    as_begun,
    continue_run,
    refuse_lost_checkpoints,
)
from launch.run.directory import RunDirectory, is_done_at, open_run
from launch.run.evaluations import early_end
from launch.run.lock import refuse_if_running
from launch.run.planned import plan_attempt
from launch.subprocesses import call_module

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index

# Of a run: checkpoints of a few adapters; more is for the machine's owner to see to.
NEEDED_BYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """A request for a run, as the command line or a job states it."""

    recipe: str
    """Name or file of a recipe."""
    overrides: Sequence[str] = ()
    """`KEY=VALUE` of the recipe."""
    strategy: str | None = None
    """None: by the number of processes."""
    gpus_per_node: int | None = None
    """None: the GPUs that are here."""
    name: str | None = None
    """None: the recipe's."""
    runs_dir: Path
    fresh: bool = False
    """Move a run of that name aside and begin anew."""
    allow: Sequence[str] = ()
    """What may differ from the run that goes on."""
    source: Path | None = None
    """A checkpoint of another run to begin with."""
    topology: Topology | None = None
    """Of other machines than this one; then strategy and gpus_per_node are not looked at."""
    machine: Machine = ALONE
    """Which of several machines without a scheduler this is."""
    gpu_memory: str | None = None
    """Of each GPU, as the command line says it."""


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


def load_index(recipe_file: Path, recipe: Recipe, overrides: Sequence[str]) -> Index:
    """The prepared index; starts `trainer.prepare` when it is missing or stale, or the base model is not there."""
    index = read_index(recipe)
    if index is None or not base_is_there(recipe):
        start_prepare(recipe_file, overrides)
        index = read_index(recipe)
    else:  # `prepare` says it itself
        for line in summarize_notes(known_notes(recipe) or []):
            log_stderr(f"{recipe.data.dataset}: {line}")
    if index is None:
        raise RunError(f"{recipe_file}: prepare ended without an index; run `samestep prepare {recipe_file}`")
    return index


def start_prepare(recipe_file: Path, overrides: Sequence[str], *, vision: bool = False) -> None:
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
        refuse_what_is_not_here(topology)
    refuse_unwritable(run.path if run.path.is_dir() else run.path.parent)
    refuse_if_running(run)
    source = request.source.expanduser().resolve() if request.source else None
    if request.fresh and source and source.is_relative_to(run.path.resolve()):
        raise ConfigError(
            f"--from: {request.source} lies in the run that --fresh moves aside ({run.path}); choose another --name"
        )
    asked, recipe = recipe, as_begun(_begun(request, run), recipe, source)
    for change in changes(altering_values(recipe), altering_values(asked)):
        log_stderr(f"{change.key}: {change.old}, as the run was begun; write it into the recipe to change it")
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
    plan, changed = plan_attempt(
        _begun(request, run),
        recipe,
        index,
        run_identity.find_identity(recipe, index),
        checked.topology,
        continuation,
        allow=request.allow,
        name=run.name,
    )
    return PlannedRun(recipe, plan, run, continuation, changed)


def is_done(planned: PlannedRun) -> bool:
    """This run, whose recipe and data may go on, has taken its last step already, and its adapter is there."""
    return is_done_at(planned.run, planned.plan.max_steps, early_end(planned.run, planned.recipe))


def describe_start(planned: PlannedRun, request: RunRequest) -> str:
    """Say in one line where the request would begin, go on, or find the run done. Writes nothing.

    Raises CheckpointError where training would be refused: the run has a result, and no checkpoint to go on from.
    """
    run, last = planned.run, planned.plan.max_steps
    if request.fresh:
        aside = "the older run is moved aside, and " if run.path.exists() else ""
        return f"{run.path}: {aside}trained from step 0 to {last:,}"
    if is_done(planned):
        end = early_end(run, planned.recipe)
        step = f"{last if end is None else end:,}"
        return (
            f"{run.path}: done already, step {step} of {last:,}, adapter in {run.adapter}; nothing to change"
        )
    newest = find_beginning(planned)
    if newest is not None:
        return f"{run.path}: goes on from {newest.folder.name}, step {newest.step:,} of {last:,}"
    if (source := planned.continuation.source) is not None:
        return f"{run.path}: begins with {source}, to step {last:,}"
    return f"{run.path}: begins at step 0 of {last:,}"


def find_beginning(planned: PlannedRun) -> Checkpoint | None:
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
        raise ConfigError(f"--runs-dir: {place} is a file, no folder; choose another --runs-dir")
    usage = shutil.disk_usage(place)
    # A file system without blocks (/proc, /sys) takes no files, whatever its modes say to root.
    if not os.access(place, os.W_OK | os.X_OK) or usage.total == 0:
        raise ConfigError(f"{folder}: cannot be written; give permission, or choose another --runs-dir")
    free = usage.free
    if free < NEEDED_BYTES:
        raise NoSpaceError(
            f"{folder}: no space left for a run ({free / 2**20:,.0f} MB free, "
            f"{NEEDED_BYTES / 2**20:,.0f} MB needed); make room, or choose another --runs-dir"
        )


@contextmanager
def moved_aside(run: RunDirectory, fresh: bool) -> Iterator[Path | None]:
    """Rename an existing run to <name>.<timestamp> when `fresh`; back, when the block fails and leaves no other.

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
