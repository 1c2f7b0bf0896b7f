"""A run's folder opened again in this one process, to look into one of its steps: what the audit commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

from launch.errors import ConfigError, RunError, SamestepError
from launch.inputs.dataset_index import read_index
from launch.planning.plan import Plan
from launch.planning.step_plan import MicroBatch
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory
from trainer.checkpoint.resume import remove_later_metrics, resume_point
from trainer.data.micro_batches import PackedBatch, assemble
from trainer.data.splits import open_split
from trainer.distributed.collectives import to_user_error
from trainer.distributed.process_group import check_same_plan, init_process_group
from trainer.distributed.stop_requests import StopRequests
from trainer.logging_setup import print_error, setup_logging
from trainer.loop.build import build, close
from trainer.loop.dataloaders import uncached
from trainer.loop.oom_trial import fit_to_memory
from trainer.loop.trainer import PlannedTrainer
from trainer.startup_timer import StartupTimer
from trainer.task import LeftOut, Task
from trainer.train import take_steps

logger = get_logger("trainer")


class _At(TrainerCallback):
    """Calls `look` with the weights from which `step` (counted from 1) is taken; ends the training after `last`."""

    def __init__(self, look: Callable[[], None], step: int, last: int) -> None:
        self._look, self._step, self._last = look, step, last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step - 1:
            self._look()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self._last


def open_task(folder: Path, left_out: LeftOut) -> Task:
    """The task of a run's folder, whose plan is for one process."""
    run = RunDirectory(folder.absolute())
    recipe, plan = load_recipe(run.recipe_file), Plan.read(run.plan_file)
    index = read_index(recipe)
    if index is None:
        raise ConfigError(f"{recipe.data.dataset}: is not prepared here; run `samestep prepare` first")
    return Task(recipe, plan, index, run, left_out=left_out)


def train_through(task: Task, step: int, last: int, look: Callable[[PlannedTrainer], None]) -> PlannedTrainer:
    """Train from the folder's checkpoint to step `last`; `look` sees the model before `step` is taken.

    Raises:
        SamestepError: as `trainer.train.train`.
    """
    timer = StartupTimer.of_this_process()
    state = init_process_group()
    check_same_plan(task, state)
    checkpoint = resume_point(task)
    begin = checkpoint.step if checkpoint else 0
    remove_later_metrics(task.run, begin)
    trainer = build(task, state, StopRequests(task.run, 0, None), begin, timer)
    try:
        fit_to_memory(trainer)
        trainer.add_callback(_At(lambda: look(trainer), step, last))
        take_steps(trainer, timer, str(checkpoint.folder) if checkpoint else None, False)
    finally:
        close(trainer)
    if trainer.state.global_step < last:
        raise RunError(f"step {trainer.state.global_step} of {last} was reached; see the words above")
    return trainer


def packed(trainer: PlannedTrainer, samples: Sequence[int], step: int) -> PackedBatch:
    """A micro-batch of these samples in `step` (counted from 1), with the dropout masks that they have there."""
    split = trainer.index.splits["train"]
    target_tokens = int(split.target_tokens[trainer.step_plan.samples(step - 1)].sum())
    rows = open_split(trainer.recipe, "train")
    batch = MicroBatch(tuple(samples), filler=False)
    return assemble(rows, split, uncached(trainer.encoder), batch, step - 1, target_tokens)


def ended_by(action: Callable[[], None]) -> int:
    """Run an entry of the audit; returns its exit status, and a user sees no traceback of what a user did."""
    setup_logging()
    try:
        action()
    except SamestepError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return print_error(to_user_error(error))
    return 0
