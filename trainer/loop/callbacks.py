"""What happens between two steps: the figures are written, and what was asked for becomes a save or the end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from trainer.loop.trainer import PlannedTrainer


class StepEnd(TrainerCallback):
    """Hands the moments of a step to the trainer."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self.trainer = trainer
        self._learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed state brings the cadence it was saved with.
        state.eval_steps, state.save_steps = args.eval_steps, args.save_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_reduced()
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.write_step(self._learning_rate)
        first = trainer.recipe.checkpoint.first_step and state.global_step == trainer.resumed_at + 1
        if trainer.agreed.stop or trainer.agreed.save or first:
            control.should_save = True
        if trainer.agreed.stop:
            control.should_training_stop = True
