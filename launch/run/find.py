"""A run by its name or its folder."""

from __future__ import annotations

from pathlib import Path

from launch.errors import ConfigError
from launch.run.directory import RunDirectory


def find_run(name: str, runs_dir: Path, whole: bool = True) -> RunDirectory:
    """Find a run by name below `runs_dir`, or by path. ConfigError when there is none.

    `whole`: with its recipe and plan; without, a folder that has a checkpoint will do.
    """
    path = Path(name).expanduser()
    candidates = [runs_dir.expanduser() / name, path] if len(path.parts) == 1 else [path]
    for candidate in candidates:
        run = RunDirectory(candidate.absolute())
        if run.recipe_file.is_file() and run.plan_file.is_file():
            return run
        begun = run.metrics_file.is_file() or any(run.path.glob("checkpoint-*"))
        if not whole and begun:
            return run
        if begun:
            lost = [file.name for file in (run.recipe_file, run.plan_file) if not file.is_file()]
            raise ConfigError(
                f"{run.path}: has no {' and no '.join(lost)}, which tell what was trained; give the same "
                "`samestep run` again, which writes them anew, or bring back a copy"
            )
    places = ", ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"{name}: no such run ({places}); give the name or the folder of a run, see --runs-dir")
