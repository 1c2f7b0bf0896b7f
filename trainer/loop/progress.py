"""What a user watches while a run goes on: a progress bar on rank 0, and trackio."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.untrusted_files import LINE, printable, read_text
from trainer.attempt_log import LOG
from trainer.loop.hub_upload import CheckpointUpload
from trainer.loop.step_figures import StepFigures, screen_text
from trainer.loop.trackers import TrackerCallback
from trainer.progress_bars import ShortenedText
from trainer.task import Task


class ProgressBar(TrainerCallback):
    """A bar with the last loss; on a log file, a line every `logging_steps`."""

    def __init__(self, resumed_at: int, figures: StepFigures) -> None:
        self._figures = figures
        self._console = Console(stderr=True)
        self._resumed_at = resumed_at
        self._bar: tuple[Progress, TaskID] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._console.is_terminal:
            return
        progress = Progress(
            TextColumn("step"),
            BarColumn(12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            ShortenedText(),
            console=self._console,
        )
        self._bar = (progress, progress.add_task("", total=state.max_steps, completed=self._resumed_at))
        progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = screen_text(logs or {}, self._figures.seconds_left)
        if self._bar:
            progress, task = self._bar
            progress.update(task, description=shown)
            LOG.add_line(f"step {state.global_step}/{state.max_steps} {shown}\n".encode())
        else:
            print(f"step {state.global_step}/{state.max_steps} {shown}", file=sys.stderr, flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar:
            progress, task = self._bar
            progress.update(task, completed=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar:
            self._bar[0].stop()


class Trackio(TrainerCallback):
    """Logs to trackio, local unless `tracking.space_id` names a Space; one run per name, continued on resume.

    Not transformers' own callback: that one also stores the whole configuration of model and trainer, this the recipe.
    """

    def __init__(self, recipe: Recipe, run_directory: RunDirectory) -> None:
        self._recipe, self._run_directory = recipe, run_directory
        self._run: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._recipe.tracking.space_id is None:
            # trackio 0.43 takes these over an absent space_id: the recipe says local.
            for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(variable, None)
        try:
            import trackio

            with self._quiet_when_local():
                self._run = trackio.init(
                    project=self._recipe.tracking.project,
                    name=tracking_name(self._run_directory),
                    space_id=self._recipe.tracking.space_id,
                    config=self._recipe.model_dump(mode="json"),
                    resume="allow",
                    embed=False,
                )
        except Exception as error:
            self._give_up(error)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs:
            self._guarded(lambda run: run.log(dict(logs), step=state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self._quiet_when_local():
            self._guarded(lambda _: _finish_trackio())

    def _quiet_when_local(self) -> contextlib.AbstractContextManager[Any]:
        """trackio 0.43 prints "Uploading logs" and more for a database on this disk; a Space's address is shown."""
        if self._recipe.tracking.space_id is not None:
            return contextlib.nullcontext()
        return contextlib.redirect_stdout(io.StringIO())

    def _guarded(self, action: Callable[[Any], None]) -> None:
        """Whatever ails the tracker, the training goes on: metrics.jsonl has it all."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logging.getLogger("trainer").warning("trackio: not used (%s: %s)", type(error).__name__, error)


def _finish_trackio() -> None:
    """Not `Run.finish`: after that trackio 0.43 finishes the run once more, and says so, when the process ends."""
    import trackio

    trackio.finish()


def tracking_name(run: RunDirectory) -> str:
    """Return one name for all attempts of a run, another for a run of the same name begun afresh."""
    file = run.path / ".trackio"
    if not file.exists():
        file.write_text(f"{run.name}-{datetime.now():%Y%m%d-%H%M%S}")
    return printable(read_text(file, LINE).strip())


def progress_callbacks(task: Task, resumed_at: int) -> list[TrainerCallback]:
    """Return what rank 0 shows of a run; nothing on the others."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return []
    recipe, run = task.recipe, task.run
    figures = StepFigures(recipe, task.index, task.plan)  # first: the others are handed what it adds
    shown: list[TrainerCallback] = [figures, ProgressBar(resumed_at, figures)]
    if "trackio" in recipe.tracking.trackers:
        shown.append(Trackio(recipe, run))
    if others := [tracker for tracker in recipe.tracking.trackers if tracker != "trackio"]:
        shown.append(TrackerCallback(others, recipe, run, lambda: tracking_name(run), resumed_at))
    if recipe.hub.push and recipe.hub.every_checkpoints:
        shown.append(CheckpointUpload(run, recipe))
    return shown
