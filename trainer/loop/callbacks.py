"""What happens between two steps: the metrics are written, a checkpoint is saved, or the run stops."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from numpy.typing import NDArray
from transformers import TrainerCallback

from launch.errors import RunError
from launch.planning.plan import samples_consumed
from trainer import WATCHDOG
from trainer.checkpoint.best import judge_evaluation
from trainer.distributed.collectives import gather_objects
from trainer.loop.step_figures import memory_figures
from trainer.loop.trainer import PlannedTrainer
from trainer.metrics_log import append_line, samples_digest, step_rows_digest
from trainer.model.chosen_kernels import chosen_kernels, describe_disagreement
from trainer.startup_timer import StartupTimer

logger = get_logger("trainer")


class StepEnd(TrainerCallback):
    """The first callback in line: a step's line is in `metrics.jsonl` before anything is reported or saved.

    `timer` measures the way to the first step. The time of a step excludes the evaluation and the save before it.
    """

    def __init__(self, trainer: PlannedTrainer, timer: StartupTimer) -> None:
        self.trainer, self._timer = trainer, timer
        self._learning_rate = 0.0
        self.step_began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timer.record("wrapping")
        self.trainer.record.begin()
        # A resumed state brings the cadence it was saved with.
        state.eval_steps, state.save_steps = args.eval_steps, args.save_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.at_first_micro_batch:  # `_get_grad_norm`, private to transformers, was not called
            raise RunError(
                "transformers: its Trainer did not ask for the gradient norm before the optimizer step, so the "
                "gradients were not added up; install the versions of constraints.txt"
            )
        self._learning_rate = kwargs["optimizer"].param_groups[0][
            "lr"
        ]  # the scheduler moves it after the step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        self._write_step()
        trainer.record.end_step(state.global_step)
        # All ranks agreed on these requests in the step's all-reduce, so all of them save and stop here together.
        requests = trainer.agreed_requests
        first = trainer.recipe.checkpoint.first_step and state.global_step == trainer.resumed_at + 1
        if requests.stop or requests.save or first:
            control.should_save = True
        if requests.stop:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.record.summarize()
        if self.trainer.recheck:
            logger.info(self.trainer.recheck.summary())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save a checkpoint; `Trainer` calls this where its own would have been saved."""
        trainer = self.trainer
        if trainer.run_directory.is_copy:
            return
        learning_rate = trainer.optimizer.param_groups[0]["lr"]
        trainer.saver.save(trainer.task, state, learning_rate, requested=trainer.agreed_requests.save)
        self.step_began = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Write the evaluation; save where it is the best so far, and end a run that has stopped improving."""
        trainer = self.trainer
        self._append(trainer.run_directory.evaluations_file, {"step": state.global_step, **metrics})
        verdict = judge_evaluation(trainer.task, state.global_step)
        trainer.ended_early = verdict.ends
        control.should_save |= verdict.is_best or verdict.ends
        control.should_training_stop |= verdict.ends
        self.step_began = time.perf_counter()

    def _write_step(self) -> None:
        """Write one line to `metrics.jsonl`, and show every `logging_steps` one."""
        trainer, state = self.trainer, self.trainer.state
        step = state.global_step
        split = trainer.index.splits["train"]
        samples = trainer.step_plan.samples(step - 1)
        state.epoch = samples_consumed(trainer.plan, step) / len(split)
        values = {
            "step": step,
            "loss": trainer.loss,
            "grad_norm": trainer.grad_norm,
            "learning_rate": self._learning_rate,
            "target_tokens": int(split.target_tokens[samples].sum()),
            "tokens": int(split.tokens[samples].sum()),
            "samples": len(samples),
            "samples_digest": self._digest(samples),
            "seconds": round(time.perf_counter() - self.step_began, 4),
            **memory_figures(),
        }
        self._append(trainer.run_directory.metrics_file, values)
        if step == trainer.resumed_at + 1:
            self._report_startup()
        if step % trainer.recipe.training.logging_steps == 0 or step == trainer.plan.max_steps:
            shown = {key: values[key] for key in ("loss", "grad_norm", "learning_rate")}
            trainer.callback_handler.on_log(
                trainer.args, state, trainer.control, {**shown, "epoch": state.epoch}
            )
        self.step_began = time.perf_counter()

    def _digest(self, samples: NDArray[np.int64]) -> str:
        """Return a digest of a step's samples, in the form that this run began with."""
        if self.trainer.plan.samples_digest == "positions":
            return samples_digest(samples)
        digests = self.trainer.index.splits["train"].digests
        return step_rows_digest(digests[sample] for sample in samples)

    def _report_startup(self) -> None:
        """Log how long the first step took to come, once it is done, and record the kernels. A collective."""
        WATCHDOG.steps_begin()
        self._timer.record("step")
        logger.info(self._timer.summary())
        kernels_by_rank = gather_objects(chosen_kernels())
        if disagreement := describe_disagreement(kernels_by_rank):
            logger.warning(f"attention: ranks compute with kernels that differ in rounding: {disagreement}")
        if self.trainer.is_world_process_zero():
            self._timer.save(self.trainer.run_directory.environment_file, kernels_by_rank[0])

    def _append(self, file: Path, values: dict[str, Any]) -> None:
        """Write a line on rank 0. A full disk there reaches all ranks in the next step, and they end together."""
        if not self.trainer.is_world_process_zero():
            return
        try:
            append_line(file, values)
        except OSError as error:
            self.trainer.stop_requests.fail(error)
