"""What an attempt writes into its run: when it takes the run, and how it ended."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
import torch
from accelerate.logging import get_logger

from launch.atomic_files import atomic_write
from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.planning.auto_settings import recomputation
from launch.planning.oom_fallback import plan_with_less
from launch.planning.plan import Plan
from launch.planning.speeds import CPU, remember_speed
from launch.run.directory import (
    RunDirectory,
    StopReason,
    clear_markers,
    clear_requests,
    make_folder,
    removed_on_failure,
    write_marker,
    write_stopped,
)
from launch.run.lock import hold_lock
from launch.run.request_files import copy_checkpoint, keep_plan, write_request
from launch.untrusted_files import read_text
from trainer.metrics_log import read_lines
from trainer.task import Task

logger = get_logger("trainer")


def acquire_run(task: Task, held: ExitStack, waited_for: bool = False) -> bool:
    """Rank 0: lock the run for this process's lifetime and write what it is about to do.

    `waited_for`: `samestep run` has cleared away what was asked of earlier attempts. Returns whether the run's folder
    is new; when it cannot be written, a new one goes again.
    """
    new = make_folder(task.run)
    with removed_on_failure(task.run, new):
        held.enter_context(hold_lock(task.run.path))
        _write(task, waited_for)
    return new


def _write(task: Task, waited_for: bool) -> None:
    clear_markers(task.run)
    if not waited_for:
        forget_old_stop(task.run)
    write_request(task.run, task.recipe, task.plan)
    if task.source is not None:
        copy_checkpoint(task.source, task.run)
    atomic_write(task.run.environment_file, json.dumps(environment(task.plan), indent=1) + "\n")


def forget_old_stop(run: RunDirectory) -> None:
    """Remove a STOP file from before this process began: an attempt that was killed did not answer it."""
    with contextlib.suppress(OSError):
        if run.stop_file.is_file() and run.stop_file.stat().st_mtime < psutil.Process().create_time():
            run.stop_file.unlink()
            logger.warning(f"{run.stop_file}: is from before this start, removed")


def environment(plan: Plan) -> dict[str, object]:
    """Return where and with what this attempt runs."""
    return {
        "versions": plan.versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name()
        if plan.device == "cuda"
        else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


@dataclass(frozen=True)
class AttemptResult:
    """Where an attempt ended, and why when it was not at the last step."""

    step: int
    stop: StopReason | None = None


def write_exit_marker(task: Task, ended: AttemptResult) -> None:
    """Say how the attempt ended; what was asked of it is answered."""
    if ended.stop:
        where = f"at step {ended.step} of {task.plan.max_steps}"
        if not task.run.is_copy:
            logger.info(f"stopped, {ended.stop}: {where}; the same command goes on")
        write_stopped(task.run, ended.stop, where)
    else:
        write_marker(task.run, "DONE", f"step {ended.step}")
        clear_requests(task.run)


def remember_attempt_speed(task: Task, began_at: int) -> None:
    """For the next forecast: how fast the steps of this attempt were. A full disk or a damaged line is no matter."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        lines = read_lines(task.run.metrics_file)
        seconds = {line["step"]: float(line["seconds"]) for line in lines if line["step"] > began_at}
        card = torch.cuda.get_device_name() if task.plan.device == "cuda" else CPU
        remember_speed(task.recipe, task.index, task.plan, card, seconds)


def write_smaller_plan(task: Task) -> None:
    """For the next attempt: settings that need less memory than those that did not suffice, in plan.json."""
    with contextlib.suppress(OSError):
        plan = Plan.from_json(read_text(task.run.plan_file))
        if plan.settings.out_of_memory > task.plan.settings.out_of_memory:
            return  # another rank was faster
        smaller = plan_with_less(task.recipe, task.index, plan, reloading=True)
        if smaller is None:
            return
        keep_plan(task.run, smaller.with_settings(out_of_memory=plan.settings.out_of_memory + 1))
        logger.warning(
            f"{task.run.plan_file}: the next attempt takes {smaller.micro_batch_tokens:,} tokens a micro-batch, "
            f"recomputed: {recomputation(smaller.settings.activation_checkpoint_every)}"
        )


def write_exit_reason(run: RunDirectory, error: SamestepError, new: bool = False) -> None:
    """Write why a request was refused where `samestep run` looks for it; a failed run leaves no marker.

    `new`: nobody waits for the reason, and the folder is of this attempt: what is refused leaves none.
    """
    with contextlib.suppress(OSError):
        if not isinstance(error, ConfigError | CheckpointError):
            return
        if new and not run.has_work():
            shutil.rmtree(run.path)
        else:
            write_marker(run, "REFUSED", str(error))
