"""Recipe and plan of a finished run, written anew where they are gone or damaged and its last checkpoint agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write
from launch.checkpoints.manifest import read_manifest
from launch.errors import CheckpointError, ConfigError
from launch.local.planned_run import PlannedRun
from launch.planning.plan import Plan
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import dump_recipe, load_recipe
from launch.run.changes import changes
from launch.run.request_files import keep_plan
from launch.untrusted_files import UNREADABLE


def repair_records(planned: PlannedRun) -> str:
    """Write `recipe.yaml` and `plan.json` of a run that is done, where they cannot be read; returns what was done.

    The request says what they held, if the last checkpoint was written by the same recipe, data and layout. Empty
    where nothing is wrong. The caller holds the run's name.
    """
    run = planned.run
    lost = [file for file in (run.recipe_file, run.plan_file) if not _can_be_read(file)]
    if not lost:
        return ""
    names = " and ".join(file.name for file in lost)
    if reason := _reason_against(planned):
        return f"{run.path}: {names} cannot be read, and {reason}"
    if run.recipe_file in lost:
        atomic_write(run.recipe_file, dump_recipe(planned.recipe))
    if run.plan_file in lost:
        keep_plan(run, planned.plan)
    return f"{run.path}: {names} could not be read, and {'is' if len(lost) == 1 else 'are'} written anew"


def _can_be_read(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            Plan.read(file)
        else:
            load_recipe(file)
    except (ConfigError, *UNREADABLE):
        return False
    return True


def _reason_against(planned: PlannedRun) -> str:
    """Why the request may not be what the run was trained with, and what to do; empty: it is."""
    run, plan = planned.run, planned.plan
    folders = run.checkpoints()
    if not folders:
        return "no checkpoint is left that says what it was trained with; bring a copy back"
    try:
        facts: dict[str, Any] = read_manifest(folders[-1], verify=False)["facts"]
    except CheckpointError:
        return f"{folders[-1].name}, which says what it was trained with, is damaged; bring a copy back"
    if other := changes(facts.get("recipe", {}), altering_values(planned.recipe)):
        return f"{folders[-1].name} was trained with another {other[0].key}; give the recipe that it was trained with"
    if facts.get("dataset_fingerprint") != plan.dataset_fingerprint:
        return f"{folders[-1].name} was trained with other data than is prepared here; bring that back"
    strategy, processes = facts.get("strategy", plan.strategy), facts.get("world_size", plan.world_size)
    if (strategy, processes) != (plan.strategy, plan.world_size):
        return (
            f"{folders[-1].name} was written by {strategy} on {processes} processes; give the same command with "
            f"--strategy {strategy} and so many processes"
        )
    return ""
