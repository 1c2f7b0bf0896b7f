"""Several machines by hand: the first writes the run, the others wait for it and start their part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.checkpoints.adapter_file import is_whole
from launch.console import log_stderr
from launch.errors import ConfigError, SamestepError
from launch.local.launcher import Machine, launch
from launch.local.planned_run import RunRequest
from launch.local.topology import choose_topology, refuse_what_is_not_here
from launch.planning.plan import Plan
from launch.recipe.fingerprint import recipe_fingerprint
from launch.recipe.loading import find_recipe, load_recipe
from launch.recipe.schema import Recipe
from launch.run.continuation import as_begun
from launch.run.directory import Marker, RunDirectory, open_run, read_marker
from launch.run.lock import lock_holder
from launch.strategies import AUTO
from launch.untrusted_files import UNREADABLE, read_text

JOIN_PATIENCE_S = 1800.0  # the first machine may prepare data meanwhile
OLD_REFUSAL_PATIENCE_S = 20.0  # for the first machine to begin anew, which takes its last refusal away


def refuse_machine(machine: Machine) -> None:
    """ConfigError with what is missing or odd about several machines."""
    problems = []
    if machine.rank >= machine.nodes:
        problems.append(
            f"--machine-rank: {machine.rank} of {machine.nodes} machines; give a number from 0 to {machine.nodes - 1}"
        )
    if machine.nodes > 1:
        missing = [
            f"--main-process-{name}"
            for name, value in (("ip", machine.main_process_ip), ("port", machine.main_process_port))
            if value is None
        ]
        if missing:
            problems.append(
                f"{', '.join(missing)}: missing ({machine.nodes} machines); say where machine 0 is found by all"
            )
    if problems:
        raise ConfigError(problems)


def join(request: RunRequest) -> Marker:
    """The part of a machine that is not the first: wait until that has written the run, then start processes here.

    What is launched follows the first machine's plan; the ranks compare plans before they begin. Raises as `launch`,
    and ConfigError when the first machine is refused or writes nothing.
    """
    recipe = load_recipe(find_recipe(request.recipe), request.overrides)
    run = open_run(request.runs_dir, recipe.name if request.name is None else request.name)
    if not request.fresh and (done := _done_before(run, recipe)):
        return done  # the first machine starts nothing either
    _wait_for_request(run)
    plan = Plan.read(run.plan_file)
    topology = choose_topology(request.strategy, request.machine.nodes, request.gpus_per_node)
    if topology.strategy == AUTO:
        topology = replace(topology, strategy=plan.strategy)
    if (plan.strategy, plan.nodes, plan.gpus_per_node) != (
        topology.strategy,
        topology.nodes,
        topology.gpus_per_node,
    ):
        raise ConfigError(
            f"{run.plan_file}: machine 0 runs {plan.strategy} on {plan.nodes} x {plan.gpus_per_node} processes, here "
            f"{topology.strategy} on {topology.nodes} x {topology.gpus_per_node} were asked for; give the same command"
        )
    refuse_what_is_not_here(topology)
    return launch(plan, run, request.machine)


def _done_before(run: RunDirectory, recipe: Recipe) -> Marker | None:
    """The marker of this recipe's run when it is done, as `is_done`; also for a machine that has no data."""
    marker = read_marker(run)
    if marker is None or marker.kind != "DONE" or not is_whole(run.adapter):
        return None
    same = recipe_fingerprint(load_recipe(run.recipe_file)) == recipe_fingerprint(as_begun(run, recipe))
    return marker if same else None


def _wait_for_request(run: RunDirectory) -> None:
    """Until the first machine, which holds the run's name, has written what it wants; ConfigError when it does not."""
    if not _is_requested(run):
        log_stderr(f"waiting for machine 0 to begin {run.path}")
    began, old = time.monotonic(), _refusal(run)
    while not _is_requested(run):
        waited = time.monotonic() - began
        refusal = _refusal(run)
        if refusal is not None and (refusal != old or waited > OLD_REFUSAL_PATIENCE_S):
            raise ConfigError(f"machine 0 did not begin {run.path}: {refusal.reason}")
        if waited > JOIN_PATIENCE_S:
            raise ConfigError(
                f"--machine-rank: machine 0 has not begun {run.path} ({JOIN_PATIENCE_S:g} s waited); start the same "
                "command there, and let all machines share --runs-dir"
            )
        time.sleep(0.5)


@dataclass(frozen=True)
class _Refusal:
    """Why the first machine did not begin, and which of its refusals this is."""

    reason: str
    when: int


def _refusal_file(run: RunDirectory) -> Path:
    return run.path.parent / f".{run.name}.refused"


def _refusal(run: RunDirectory) -> _Refusal | None:
    try:
        file = _refusal_file(run)
        return _Refusal(read_text(file), file.stat().st_mtime_ns)
    except UNREADABLE:
        return None


@contextmanager
def telling_others(request: RunRequest) -> Iterator[None]:
    """On the first of several machines: whatever ends it in here is told to the others, which wait for the run.

    A file beside the run, which may not exist; an older one is taken away first.
    """
    if request.machine.nodes <= 1:
        yield
        return
    recipe = load_recipe(find_recipe(request.recipe), request.overrides)
    run = open_run(request.runs_dir, recipe.name if request.name is None else request.name)
    file = _refusal_file(run)
    with contextlib.suppress(OSError):
        file.unlink()
    try:
        yield
    except BaseException as error:
        reason = str(error) if isinstance(error, SamestepError) else f"it ended with {type(error).__name__}"
        with contextlib.suppress(OSError):  # then the others wait in vain
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, reason)
        raise


def _is_requested(run: RunDirectory) -> bool:
    """The name is held, and the recipe, which is written last, is of this attempt and not of an earlier one."""
    lock = f".{run.name}.lock"
    if lock_holder(run.path.parent, lock) is None:
        return False
    try:
        # Whoever takes the lock writes its name there; both times are the shared disk's.
        taken = (run.path.parent / lock).stat().st_mtime_ns
        return run.recipe_file.stat().st_mtime_ns >= taken and run.plan_file.is_file()
    except FileNotFoundError:
        return False
