"""Attempts at a run without a trainer: planned and written as `samestep run` does, saved as the trainer does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.checkpoints.publish import publish
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan, samples_consumed
from launch.planning.topology import Topology
from launch.recipe.fingerprint import altering_values
from launch.recipe.schema import Recipe
from launch.run.continuation import Continuation, continue_run
from launch.run.directory import RunDirectory
from launch.run.request_files import copy_checkpoint, write_request
from tests.helpers.checkpoints import write_aside
from tests.helpers.indexes import embedded_recipe, make_index

BATCH = "batch.global_batch_size"
INDEX = make_index(50)


def recipe_of(size: int = 8, *overrides: str) -> Recipe:
    """6 epochs of 50 samples."""
    return embedded_recipe(
        f"{BATCH}={size}", "training.num_train_epochs=6", "training.warmup_steps=0", *overrides
    )


def planned(recipe: Recipe, continuation: Continuation) -> Plan:
    return make_plan(recipe, INDEX, Topology("single", 1, 1, "cpu"), history=continuation)


def attempt(
    run: RunDirectory, recipe: Recipe, *allow: str, source: Path | None = None, save: int | None = None
) -> Plan:
    """A request as `samestep run` takes it, whose trainer saves one step, or none when it is killed before."""
    continuation = continue_run(run, recipe, allow, source)
    plan = planned(recipe, continuation)
    write_request(run, recipe, plan)
    if continuation.source:
        copy_checkpoint(continuation.source, run)
    if save is not None:
        save_step(run, recipe, plan, save)
    return plan


def save_step(run: RunDirectory, recipe: Recipe, plan: Plan, step: int, **other: Any) -> Path:
    """Publish a checkpoint as the trainer does: what a plan needs of its facts, and two small files."""
    facts = {
        "step": step,
        "samples_consumed": samples_consumed(plan, step),
        "global_batch_size": plan.global_batch_size,
        "begin": asdict(plan.begin),
        "recipe": altering_values(recipe),
        "dataset_fingerprint": plan.dataset_fingerprint,
        "identity": plan.identity,
        "started_from": plan.started_from,
    }
    final = run.checkpoint(step)
    publish(write_aside(run.path, step), final, {**facts, **other})
    return final
