"""What a run directory says was asked for: written, kept and replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.checkpoints.manifest import MANIFEST, read_manifest
from launch.checkpoints.publish import partial_folder, publish
from launch.errors import CheckpointError, ConfigError
from launch.inputs.data_report import keep_report
from launch.planning.plan import Plan
from launch.recipe.loading import dump_recipe
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory


def copy_checkpoint(source: Path, run: RunDirectory) -> None:
    """Copy a checkpoint of another run into this one, unless it has checkpoints. The caller holds the run's lock.

    Raises:
        CheckpointError: the source is damaged, or the copy is not what was published.
    """
    if run.checkpoints():
        return
    manifest = read_manifest(source, verify=True)
    step = int(manifest["facts"]["step"])
    aside = partial_folder(run.path, step)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for name in (*manifest["files"], MANIFEST):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, aside / name)
        if read_manifest(aside, verify=True) != manifest:
            raise CheckpointError(
                f"{source}: another checkpoint took its place while it was copied; try again"
            )
        publish(aside, run.checkpoint(step), {**manifest["facts"], "copied_from": str(source)})
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: went away while it was copied; its run may be under way, take a checkpoint that stays"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk needs the room


def write_request(run: RunDirectory, recipe: Recipe, plan: Plan) -> None:
    """Write `data_report.jsonl` where there is something to report, `plan.json` and `recipe.yaml`, each in one rename.

    The recipe last: a change is only believed to be allowed when the plan says so.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    keep_report(recipe, run.path)
    atomic_write(run.plan_file, plan.to_json())
    atomic_write(run.recipe_file, dump_recipe(recipe))


def started_from_of(run: RunDirectory) -> str:
    """Return the checkpoint of another run that this one began with; empty without one."""
    old = old_plan(run)
    return old.started_from if old else ""


def old_plan(run: RunDirectory) -> Plan | None:
    """Read the plan of an earlier attempt; None without one, or with one that this version cannot read."""
    try:
        return Plan.read(run.plan_file)
    except (OSError, ValueError, ConfigError):
        return None


def keep_plan(run: RunDirectory, plan: Plan) -> None:
    """Write another plan for a run under way or over, in one rename. The caller holds the run's lock."""
    atomic_write(run.plan_file, plan.to_json())
