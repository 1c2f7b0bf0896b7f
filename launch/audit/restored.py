"""A copy of a run as it was at a checkpoint, planned for what is here, so that its steps can be taken again.

The run itself is only read. The copy lies beside it, on the same disk, and goes when the block ends.
"""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.audit.recorded import identity_of, read_plan
from launch.checkpoints.scan import Checkpoint, scan_checkpoints
from launch.errors import ConfigError
from launch.inputs.identity import PARTS
from launch.local.launcher import child_environment, trainer_command
from launch.local.planned_run import PlannedRun, RunRequest, plan_run
from launch.planning.plan import Plan
from launch.recipe.loading import dump_recipe, load_recipe
from launch.run.changes import content_changes, refuse_changes
from launch.run.directory import COPY_PREFIX, RunDirectory
from launch.run.figures import read_steps
from launch.run.lock import LOCK_FILE, hold_lock, lock_holder
from launch.run.request_files import write_request
from launch.subprocesses import ChildError, wait_for

QUIET = (
    "checkpoint.every_steps=1000000000",
    "checkpoint.first_step=false",
    "checkpoint.keep_best=null",
    "training.recheck=0",
    "evaluation.early_stop=0",
    "evaluation.answers=0",
    "tracking.report_to=none",
    "hub.push=false",
)
"""What alters no number of a step, and costs time, or would show others the copy as if it were the run."""
_BEING_MADE_S = 60.0  # a folder so young may not be locked yet
UNEVALUATED = ("evaluation.every_steps=1000000000",)


@dataclass(frozen=True)
class RestoredRun:
    """The copy, what was planned for it here, and the checkpoint where it begins (None: at step 0)."""

    run: RunDirectory
    planned: PlannedRun
    request: RunRequest
    begin: Checkpoint | None

    @property
    def begins_at(self) -> str:
        """The checkpoint's name, or step 0, in words."""
        return self.begin.folder.name if self.begin else "step 0"


@contextmanager
def restored(
    run: RunDirectory, step: int, request: RunRequest, overrides: Sequence[str] = (*QUIET, *UNEVALUATED)
) -> Iterator[RestoredRun]:
    """Copy what a resume from the newest checkpoint before `step` reads, and plan it for the machine of `request`.

    `request`: with which strategy and processes, and what may differ (`--allow`); the rest of it is filled in here.

    Raises:
        ConfigError: the data or the base is another one (the part is named), or the request breaks a rule.
    """
    load_recipe(run.recipe_file)  # what is wrong with it is said of the run, not of its copy
    plan, begin = read_plan(run), _checkpoint_before(run, step)
    _remove_leftovers(run)
    with (
        tempfile.TemporaryDirectory(prefix=_prefix(run), dir=run.path.parent) as folder,
        hold_lock(Path(folder)),
    ):
        copy = RunDirectory(Path(folder) / run.name)
        _copy_until(run, copy, begin)
        asked = replace(
            request,
            recipe=str(copy.recipe_file),
            overrides=overrides,
            name=run.name,
            runs_dir=Path(folder),
            allow=(*request.allow, *PARTS),  # judged below, in words about the run instead of its copy
        )
        planned = plan_run(asked)
        _refuse_another_identity(run, plan, planned.plan, request.allow)
        yield RestoredRun(copy, planned, asked, begin)


def _prefix(run: RunDirectory) -> str:
    return f"{COPY_PREFIX}{run.name}-"


def _remove_leftovers(run: RunDirectory) -> None:
    """Remove the copies that killed processes left: nobody holds their lock, and they are not being made.

    What has no lock is none of ours, but for an empty folder, whose maker was killed before it had one.
    """
    for folder in run.path.parent.glob(f"{glob.escape(_prefix(run))}*"):
        with suppress(OSError, ConfigError):
            if time.time() - folder.stat().st_mtime <= _BEING_MADE_S or lock_holder(folder) is not None:
                continue
            if (folder / LOCK_FILE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.rmdir()


def call_here(restored_run: RestoredRun, what: str, module: str, arguments: Sequence[str]) -> None:
    """Write the copy's plan, and run a module of the trainer on it in the plan's processes.

    `what`: the command of the user that this is for, as an error names it.

    Raises:
        ChildError: it did not finish; it has said why.
    """
    planned = restored_run.planned
    write_request(restored_run.run, planned.recipe, planned.plan)
    command = trainer_command(
        planned.plan, module, ["--run-dir", str(restored_run.run.path), *map(str, arguments)]
    )
    ended = wait_for(command, child_environment(planned.plan))
    if ended.interrupted:
        raise KeyboardInterrupt
    if ended.status:
        raise ChildError(f"`samestep {what}`", ended.status)


def _refuse_another_identity(run: RunDirectory, plan: Plan, now: Plan, allow: Sequence[str]) -> None:
    """ConfigError that names each part of data and base which is another one than the run was made of."""
    changed = content_changes(identity_of(plan), identity_of(now))
    refuse_changes(changed, allow, str(run.path), "bring back what it was made of")


def _checkpoint_before(run: RunDirectory, step: int) -> Checkpoint | None:
    """The newest valid checkpoint of an earlier step; None: begin at step 0. ConfigError where one is missing."""
    plan = read_plan(run)
    earlier = [each for each in scan_checkpoints(run.path) if each.valid and each.step < step]
    newest = max(earlier, key=lambda each: each.step, default=None)
    if newest is None and plan.started_from:
        raise ConfigError(
            f"{run.path}: began with another run's checkpoint, and none before step {step} is left"
        )
    if (newest.step if newest else 0) < plan.begin.step < step:
        raise ConfigError(
            f"{run.path}: the checkpoint of step {plan.begin.step} is gone, where its plan begins (the batch size was "
            f"changed there), so step {step} cannot be taken again"
        )
    return newest


def _copy_until(run: RunDirectory, copy: RunDirectory, begin: Checkpoint | None) -> None:
    """What a resume of the copy reads: recipe, plan, figures until the checkpoint, the checkpoint."""
    copy.path.mkdir()
    # Whole: what the file of an older version lacks means something in that run's folder alone.
    atomic_write(copy.recipe_file, dump_recipe(load_recipe(run.recipe_file)))
    if begin is None:
        return
    shutil.copyfile(run.plan_file, copy.plan_file)
    steps = read_steps(run.metrics_file)
    kept = (json.dumps(steps[step]) + "\n" for step in sorted(steps) if step <= begin.step)
    atomic_write(copy.metrics_file, "".join(kept))
    shutil.copytree(begin.folder, copy.path / begin.folder.name)
