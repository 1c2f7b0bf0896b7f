"""From the command line to the task: recipe, data, plan and run directory."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger

from launch.errors import ConfigError, SamestepError
from launch.inputs.data_report import known_notes, summarize_notes
from launch.inputs.dataset_index import Index, read_index
from launch.inputs.identity import RunIdentity
from launch.inputs.model_files import old_base_identity
from launch.planning.oom_fallback import plan_on
from launch.planning.plan import Plan
from launch.planning.topology import Topology
from launch.recipe.loading import find_recipe, load_recipe
from launch.recipe.schema import Recipe
from launch.rules.accelerate_config import launched_config, launched_strategy
from launch.rules.checks import refuse_config
from launch.run.changes import consequences, content_changes, tie_contents
from launch.run.continuation import as_begun, continue_run, planned_identity
from launch.run.directory import RunDirectory, open_run
from launch.run.planned import plan_attempt
from launch.untrusted_files import read_text
from trainer.identity import compute_identity, is_first_of_node
from trainer.prepare import prepare
from trainer.pretrained import base_path
from trainer.task import Task

logger = get_logger("trainer")


def requested_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe that was asked for."""
    if options.run_dir is not None:
        return load_recipe(RunDirectory(options.run_dir).recipe_file)
    recipe = load_recipe(find_recipe(options.recipe), options.set)
    run = open_run(options.runs_dir, recipe.name if options.name is None else options.name)
    return as_begun(run, recipe, options.source)


def prepare_first(options: argparse.Namespace) -> Index:
    """Return the index, made if missing: before the process group exists, so that no watchdog counts the minutes."""
    recipe = requested_recipe(options)
    first = is_first_of_node()
    index = read_index(recipe) or prepare(recipe, quiet=not first)
    if first:
        with suppress(SamestepError):  # of one node alone, maybe: told to all ranks when they know each other
            compute_identity(recipe, index)  # remembered: all weights may have to be read
    return index


def read_task(
    options: argparse.Namespace,
    index: Index,
    identity: RunIdentity,
    state: PartialState,
    gpu_memory: int | None,
) -> Task:
    """Recipe, plan and run directory; a plain launch plans here.

    Raises:
        ConfigError: the plan does not fit what was launched, or the run belongs to another recipe.
    """
    recipe, config = requested_recipe(options), launched_config(os.environ)
    if options.run_dir is not None:
        run = RunDirectory(options.run_dir.absolute())
        plan = Plan.from_json(read_text(run.plan_file))
        if differing := content_changes(planned_identity(plan), identity):
            raise ConfigError(
                [
                    *(f"{change.key}: {change.comparison('planned for')}" for change in differing),
                    f"{run.plan_file}: was made for other data or another base (parts that differ: {len(differing)}); "
                    "run the same `samestep run` again to plan anew",
                ]
            )
        refuse_config(recipe, plan.strategy, plan.nodes, config)
        if gpu_memory is not None and not plan.gpu_memory:  # planned on a machine that did not know it
            plan = plan_on(recipe, index, plan, gpu_memory)
        return make_task(recipe, plan, index, run, identity)
    run = open_run(options.runs_dir, recipe.name if options.name is None else options.name)
    continuation = continue_run(run, recipe, options.allow, options.source)
    for line in summarize_notes(known_notes(recipe) or []):
        logger.info(f"{recipe.data.dataset}: {line}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    topology = Topology(
        launched_strategy(config, "LOCAL_RANK" in os.environ),
        max(1, state.num_processes // processes),
        processes,
        state.device.type,
        gpu_memory,
    )
    plan, changed = plan_attempt(
        run,
        recipe,
        index,
        identity,
        topology,
        continuation,
        allow=options.allow,
        name=run.name,
        config=config,
    )
    for consequence in consequences(changed):
        logger.warning(f"allowed: {consequence}")
    return make_task(recipe, plan, index, run, identity, continuation.source)


def make_task(
    recipe: Recipe,
    plan: Plan,
    index: Index,
    run: RunDirectory,
    identity: RunIdentity,
    source: Path | None = None,
) -> Task:
    """With what is allowed about data and base tied to those of now."""
    contents = dict(identity.parts)
    if not {"model.content", "model.name_or_path", "model.revision"}.isdisjoint(plan.allowed):
        # Also of a base that an older version recorded.
        contents["model.content"] = old_base_identity(Path(base_path(recipe)))
    plan = replace(plan, allowed=tie_contents(plan.allowed, contents), identity=dict(identity.parts))
    return Task(recipe, plan, index, run, source)
