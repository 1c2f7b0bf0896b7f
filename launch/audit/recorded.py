"""What the folder of a run records of itself: its plan, and what was allowed to change on the way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from launch.checkpoints.manifest import read_manifest
from launch.errors import CheckpointError, ConfigError
from launch.inputs.identity import TRAIN_ROWS, RunIdentity, recorded_identity
from launch.planning.plan import Plan
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import load_recipe
from launch.run.changes import Change, changes, content_changes
from launch.run.directory import RunDirectory
from launch.untrusted_files import UNREADABLE


def read_plan(run: RunDirectory) -> Plan:
    """The plan in a run's folder. ConfigError where it is missing or damaged."""
    try:
        return Plan.read(run.plan_file)
    except UNREADABLE as error:
        raise ConfigError(
            f"{run.plan_file}: cannot be read ({error}); give the same `samestep run` again"
        ) from None


def identity_of(plan: Plan) -> RunIdentity:
    """The parts of data and base that a plan was made of, the prepared rows among them."""
    return RunIdentity({**plan.identity, TRAIN_ROWS: plan.dataset_fingerprint})


def changes_since(run: RunDirectory, step: int) -> list[Change]:
    """What was allowed to change in a run after it took `step`: what the next checkpoint records, against what holds.

    Empty where no checkpoint of the step or later is left that can be read.
    """
    for folder in run.checkpoints():
        with suppress(CheckpointError):
            facts: dict[str, Any] = read_manifest(folder, verify=False)["facts"]
            if facts["step"] >= step:
                then, now = facts.get("recipe"), altering_values(load_recipe(run.recipe_file))
                values = changes(then, now) if isinstance(then, Mapping) else []  # an older version kept none
                return [*values, *content_changes(recorded_identity(facts), identity_of(read_plan(run)))]
    return []


def changed_since(run: RunDirectory, step: int) -> tuple[str, ...]:
    """`changes_since`, each in words."""
    return tuple(f"{change.key} was {' and is '.join(change.shown())}" for change in changes_since(run, step))


def refuse_steps_of_another_plan(run: RunDirectory, step: int, option: str) -> None:
    """ConfigError for a step from before a change of plan or rows: its samples are not those of what the run keeps."""
    rows = next((change for change in changes_since(run, step) if change.key == TRAIN_ROWS), None)
    if rows is not None:
        raise ConfigError(
            f"{option}: step {step} of {run.name} was taken before a change that was allowed ({TRAIN_ROWS} was "
            f"{rows.shown()[0]}, is {rows.shown()[1]}), so its samples are not known; name a later step"
        )
    if step <= (begun := read_plan(run).begin.step):
        raise ConfigError(
            f"{option}: step {step} of {run.name} was taken with an earlier plan (the batch size was changed after "
            f"step {begun}), so its samples are not known; name a later step"
        )
