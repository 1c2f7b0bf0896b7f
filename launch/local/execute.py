"""A run that is planned and written: claimed, started, and started once more with smaller settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from launch.console import log_stderr
from launch.errors import ConfigError, InUseError, RunError
from launch.local.launcher import ALONE, Machine, launch
from launch.local.planned_run import PlannedRun, RunRequest, check_request, find_beginning, plan_run
from launch.run.directory import Marker, clear_markers, clear_requests, make_folder, removed_on_failure
from launch.run.lock import hold_lock
from launch.run.request_files import copy_checkpoint, old_plan, write_request


@contextmanager
def reserve_name(planned: PlannedRun, request: RunRequest) -> Iterator[None]:
    """Keep the run's name from a second `samestep run`, which may have come first while data was prepared."""
    planned.run.path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(planned.run.path.parent, f".{planned.run.name}.lock"):
        if check_request(request).continuation != planned.continuation:
            raise ConfigError(
                f"{planned.run.path}: went on while this was planned; give the same command again"
            )
        yield


def execute(planned: PlannedRun, machine: Machine = ALONE) -> Marker:
    """Write the run directory and train; returns and raises as `launch`."""
    run = planned.run
    new = make_folder(run)
    with removed_on_failure(run, new), hold_lock(run.path):  # a plain `accelerate launch` may have come first
        find_beginning(planned)
        clear_markers(run)
        clear_requests(run)
        write_request(run, planned.recipe, planned.plan)
        if planned.continuation.source is not None:
            copy_checkpoint(planned.continuation.source, run)
    try:
        return launch(planned.plan, run, machine)
    except ConfigError as refused:
        others_take_it = isinstance(refused, InUseError) or machine.nodes > 1  # the others read there why
        if new and not others_take_it and not run.has_work():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def execute_with_oom_retry(planned: PlannedRun, request: RunRequest) -> Marker:
    """Execute a plan; once more, from the newest checkpoint, when a GPU ran out of memory and smaller settings are
    known.

    With several machines there is no second time: the others would have to be told.
    """
    try:
        return execute(planned, request.machine)
    except RunError:
        smaller = old_plan(planned.run)
        if (
            request.machine.nodes > 1
            or smaller is None
            or smaller.settings.out_of_memory <= planned.plan.settings.out_of_memory
        ):
            raise
    log_stderr("a GPU ran out of memory; once more, with settings that need less of it")
    return execute(plan_run(replace(request, fresh=False)), request.machine)
