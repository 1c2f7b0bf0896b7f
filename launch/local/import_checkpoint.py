"""A `--from` that another library wrote: it becomes a checkpoint of ours before the run is planned."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path

from launch.checkpoints.manifest import MANIFEST, OPTIMIZER_FILE, SHARDS
from launch.checkpoints.scan import newest_valid
from launch.errors import ConfigError, RunError
from launch.inputs.caches import cache_root
from launch.local.planned_run import RunRequest
from launch.recipe.fingerprint import recipe_fingerprint
from launch.recipe.loading import find_recipe, load_recipe
from launch.run.directory import RunDirectory, open_run
from launch.run.request_files import started_from_of
from launch.subprocesses import call_module


def import_foreign_checkpoint(request: RunRequest) -> RunRequest:
    """A `--from` of another library becomes a checkpoint of ours, in the cache, and the request one of that.

    Starts `trainer.import_checkpoint` unless that was done for this checkpoint and run. ChildError when it is refused.
    """
    source = request.source.expanduser().resolve() if request.source else None
    if source is not None:
        _refuse_whole_run(source)
    ours = source is not None and any((source / name).exists() for name in (MANIFEST, OPTIMIZER_FILE, SHARDS))
    if source is None or not source.is_dir() or ours:
        return request
    recipe_file = find_recipe(request.recipe)
    recipe = load_recipe(recipe_file, request.overrides)
    run = open_run(request.runs_dir, recipe.name if request.name is None else request.name)
    place = cache_root() / "taken-over" / hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    begun = Path(started_from_of(run))
    if begun.is_relative_to(place) and run.checkpoints() and not request.fresh:
        return replace(request, source=begun)  # whatever became of the source since
    newest = _newest_change(source)
    key = hashlib.sha256(f"{newest} {recipe_fingerprint(recipe)}".encode()).hexdigest()[:16]
    output = place / key
    if not output.is_dir() or newest_valid(output)[0] is None:
        flags = [word for override in request.overrides for word in ("--set", override)]
        call_module(
            "trainer.import_checkpoint", [str(recipe_file), str(source), "--output", str(output), *flags]
        )
    taken, _ = newest_valid(output)
    if taken is None:
        raise RunError(f"{source}: was imported, but {output} holds no valid checkpoint; try again")
    return replace(request, source=taken.folder)


def _newest_change(folder: Path) -> int:
    """In nanoseconds since 1970. The library that wrote the checkpoint may be taking files away meanwhile."""
    newest = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, file.lstat().st_mtime_ns)
    return newest


def _refuse_whole_run(source: Path) -> None:
    """ConfigError for `--from RUN`: read as a bare adapter, it would go on without its moments and its step."""
    folder = source.parent if source.name == "adapter" else source
    run = RunDirectory(folder)
    if not source.is_dir() or not (run.recipe_file.is_file() and run.plan_file.is_file()):
        return
    newest, _ = newest_valid(folder)
    there = f"give its newest, {newest.folder}" if newest else "it has none that is valid"
    raise ConfigError(f"--from: {source} is a run, not one of its checkpoints; {there}")
