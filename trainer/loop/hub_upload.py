"""Uploads to the hub beside a training: in children of rank 0, so that no answer of the hub stops or fails it."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from typing import Any

from transformers import TrainerCallback

from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory

logger = logging.getLogger("trainer")
FINAL_PATIENCE_S = 900.0  # for the upload of the finished adapter, after which the same is one command


def start_upload(run: RunDirectory, recipe: Recipe, *arguments: str) -> subprocess.Popen[bytes] | None:
    """Start a child that uploads; its words go to `logs/hub.log` in the run's folder. None where it cannot start."""
    command = [sys.executable, "-m", "launch.hub.push", "--run-dir", str(run.path)]
    command += ["--repo", str(recipe.hub.repo_id), *arguments]
    if not recipe.hub.private:
        command.append("--public")
    try:
        (run.path / "logs").mkdir(exist_ok=True)
        with (run.path / "logs" / "hub.log").open("ab") as log:
            # A group of its own: a Ctrl-C is for the training, whose checkpoint the upload is.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )
    except OSError as error:
        logger.warning("hub: the upload could not be started (%s); the training goes on", error.strerror)
        return None


class CheckpointUpload(TrainerCallback):
    """Uploads every n-th checkpoint; one that falls due while an upload is under way is passed over."""

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        self._run, self._recipe = run, recipe
        self._saves = 0
        self._child: subprocess.Popen[bytes] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saves += 1
        if self._saves % self._recipe.hub.every_checkpoints:
            return
        if self._child is not None and self._child.poll() is None:
            logger.warning("hub: checkpoint %d is not uploaded, an earlier one still is", state.global_step)
            return
        if self._child is not None and self._child.returncode:
            logger.warning("hub: the last upload failed; see %s", self._run.path / "logs" / "hub.log")
        self._child = start_upload(self._run, self._recipe, "--checkpoint", str(state.global_step))


def upload_final(run: RunDirectory, recipe: Recipe) -> None:
    """Upload the finished adapter, and wait for it. On rank 0, when the run is done and nobody waits for this rank."""
    child = start_upload(run, recipe)
    if child is None:
        return
    try:
        status = child.wait(timeout=FINAL_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            child.terminate()
        status = -1
    again = f"samestep push {run.path} --repo {recipe.hub.repo_id}"
    if status:
        logger.warning("hub: not uploaded, see %s; `%s` tries again", run.path / "logs" / "hub.log", again)
    else:
        logger.info("hub: uploaded to %s", recipe.hub.repo_id)
