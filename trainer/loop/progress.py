"""What a user watches while a run goes on: a progress bar on rank 0, and trackers."""

from __future__ import annotations

import sys
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


def progress_callbacks(task: Task, resumed_at: int) -> list[TrainerCallback]:
    """Return what rank 0 shows of a run; nothing on the others."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return []
    recipe, run = task.recipe, task.run
    figures = StepFigures(recipe, task.index, task.plan)  # first: the others are handed what it adds
    shown: list[TrainerCallback] = [figures, ProgressBar(resumed_at, figures)]
    if recipe.tracking.trackers:
        shown.append(TrackerCallback(recipe.tracking.trackers, recipe, run, resumed_at))
    if recipe.hub.push and recipe.hub.every_checkpoints:
        shown.append(CheckpointUpload(run, recipe))
    return shown
