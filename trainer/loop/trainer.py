"""trl's `SFTTrainer` with our data order, loss, gradient reduction and checkpoints.

Read from top to bottom it is one training step: micro-batches, forward and backward, one reduction of all that the
ranks must agree on, clipping. `Trainer`'s loop (transformers 5.23, `_run_epoch`) then takes the optimizer step and
calls `trainer.loop.callbacks.StepEnd`: metrics, saves. Each override says what it replaces, and why.
"""

from __future__ import annotations

import gc
import logging
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerControl
from trl import SFTTrainer

from launch.planning.run_steps import step_plan
from trainer import WATCHDOG
from trainer.checkpoint.saver import Saver
from trainer.checks.training import GradientCheck, check_adapters, check_finite, check_step_taken
from trainer.data.encoder import Encoder
from trainer.data.loader import Loader
from trainer.data.micro_batches import EvaluationBatches, MicroBatches, PackedBatch
from trainer.distributed.stop_requests import AgreedRequests, StopRequests
from trainer.engine.replicated import Replicated
from trainer.engine.zero import Zero
from trainer.garbage import GarbageBetweenSteps
from trainer.loop import dataloaders
from trainer.loop.evaluation import validation_loss
from trainer.loop.kernels_ahead import load_kernels_ahead
from trainer.loop.preparation import checked_wrapping, prepare_model, restore_optimizer
from trainer.loop.progress import progress_callbacks
from trainer.loop.recheck import Recheck
from trainer.loop.step_record import StepRecord
from trainer.loop.tower_ahead import run_tower, tower_can_run_ahead
from trainer.loop.training_args import training_arguments
from trainer.model.fsdp import gather_from_here
from trainer.model.lora import trainable_parameters
from trainer.model.products_ahead import SeenProducts
from trainer.task import Task
from trainer.vision_cache.writer import open_writer

logger = logging.getLogger("trainer")


class PlannedTrainer(SFTTrainer):  # type: ignore[misc]
    """Runs a task's plan from step `resumed_at`, 0 for a new run.

    `loss`, `grad_norm`: of the last step, per target token and before clipping, the same on all ranks.
    """

    control: TrainerControl

    def __init__(
        self, model: PeftModel, task: Task, encoder: Encoder, stop_requests: StopRequests, resumed_at: int
    ) -> None:
        self.task, self.encoder, self.resumed_at = task, encoder, resumed_at
        self.stop_requests, self.agreed_requests = stop_requests, AgreedRequests()
        self.recipe, self.plan, self.index, self.run_directory = task.recipe, task.plan, task.index, task.run
        self.step_plan = step_plan(self.recipe, self.index, self.plan)
        adapters = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
        super().__init__(
            model=model,
            args=training_arguments(self.recipe, self.plan, self.run_directory.path),
            # Never read: trl wants a Dataset whose first row looks like an image row.
            train_dataset=Dataset.from_dict({"image": [0]}),
            eval_dataset=Dataset.from_dict({"image": [0]}),
            data_collator=lambda rows: rows,
            processing_class=encoder.processor,
            callbacks=progress_callbacks(task, resumed_at),
        )
        self.remove_callback(PrinterCallback)
        self.parameters = trainable_parameters(self.model)
        for name, parameter in self.parameters.items():
            parameter.data = adapters[name]  # trl 1.16 rounds those of a quantized model to bf16
        check_adapters(self.parameters)
        stage = self.plan.parallelism.zero_stage
        self.engine = Zero(self.parameters, stage) if stage else Replicated(self.parameters)
        self.features = open_writer(encoder.features)
        prepare_model(self.model, self.recipe, self.plan, self.features)
        self.saver = Saver(self.recipe.checkpoint.format, self.model, self.engine, stop_requests)
        self.evaluation_interrupted = self.ended_early = False
        self.garbage = GarbageBetweenSteps()
        self.record = StepRecord()
        self.loss = self.grad_norm = float("nan")
        self.training_loader: Loader | None = None
        self.trial_batch: Loader | None = None  # of one micro-batch, begun before there was a model to try
        self.seen_products: SeenProducts | None = None  # in the trial; until they were computed ahead
        self.loaded_optimizer_state: dict[str, Tensor] | None = None
        self.gradient_check: GradientCheck | None = None  # in the first step of an attempt
        self._step_loss: Tensor | None = None  # of this rank's micro-batches of the step so far
        self.recheck = Recheck(self) if self.recipe.training.recheck else None
        self.out_of_memory = False  # in the step under way, on this rank
        # Features that are cached meanwhile, and steps that are computed again, take a micro-batch as it was packed.
        self.tower_runs_ahead = not (self.features or self.recheck) and tower_can_run_ahead(model)

    # --- micro-batches ------------------------------------------------------------------------------------------

    def begin_reading(self) -> None:
        """Open the micro-batches after the resumed step, by the step plan: data workers decode from here on."""
        batches = dataloaders.training_batches(
            self.task, self.encoder, self.step_plan, self.args.process_index
        )
        first = self.resumed_at * self.plan.micro_batches
        gc.freeze()  # what is here stays shared with the workers, whose collectors do not walk over it
        self.training_loader = self._open_loader(batches, range(first, len(batches))).begin()

    def close_training_loader(self) -> None:
        """End the data workers of the training."""
        if self.training_loader:
            self.training_loader.close()
            self.training_loader = None

    def get_train_dataloader(self) -> Loader:
        """Hand over the micro-batches that are being read; `Trainer`'s own draws from a sampler."""
        if self.training_loader is None:
            self.begin_reading()
        return cast(Loader, self.training_loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        """Open this rank's share of the validation samples: each exactly once, where `Trainer` pads the last batch."""
        batches = dataloaders.evaluation_batches(self.task, self.encoder, self.args.process_index)
        return self._open_loader(batches, range(len(batches)))

    def _open_loader(self, batches: MicroBatches | EvaluationBatches, numbers: range) -> Loader:
        self.saver.wait()  # data workers are forked, and must not inherit a lock that a writing thread holds
        if self.features:
            self.features.wait()
        return dataloaders.open_loader(batches, numbers, self.plan, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        """Nothing: the index knows the step's target tokens, which `Trainer` would gather from all ranks."""

    # --- forward and backward of a micro-batch --------------------------------------------------------------------

    @property
    def at_first_micro_batch(self) -> bool:
        """Return whether the next micro-batch is the first one of a step."""
        return self._step_loss is None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Compute one micro-batch; the gradients stay on this rank until the step's reduction, where the engine can.

        `Trainer`'s own walks over all modules to switch them to training mode, which they are in (7B parameters: 8 ms a
        step), and a rank that runs out of memory leaves the others waiting.
        """
        WATCHDOG.micro_batch_begins()
        if self.seen_products and self.state.global_step > self.resumed_at:
            load_kernels_ahead(self, self.seen_products)
            self.seen_products = None
        if self.recheck:
            return self.recheck.around(inputs, lambda: self._compute_micro_batch(model, inputs))
        return self._compute_micro_batch(model, inputs)

    def _compute_micro_batch(self, model: nn.Module, inputs: PackedBatch) -> Tensor:
        if self.gradient_check and self.at_first_micro_batch:
            dataloaders.log_first_targets(self.task, self.encoder, inputs)
        if self.out_of_memory:  # in an earlier micro-batch; the step's reduction tells the others
            return self._skip_micro_batch()
        with self.record.phase("features" if self.at_first_micro_batch else "launching"):
            inputs = dataloaders.use_late_features(inputs, self.encoder.features, self.features)
        try:
            with self.record.phase("launching"), self.engine.no_sync(self.accelerator, model):
                return self._forward_backward(model, inputs)
        except torch.OutOfMemoryError as error:
            if self.plan.parallelism.sharded != "nothing":
                raise  # in the middle of a collective: the launcher ends the others
            self.stop_requests.fail(error)
        self.out_of_memory = True
        return self._skip_micro_batch()

    def _forward_backward(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.micro_batch_loss(model, batch)
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        if isinstance(self.engine, Zero) and self.accelerator.sync_gradients:
            # DeepSpeed steps in this backward: all ranks must know before the step that they can take it.
            loss_and_flags = self._loss_and_flags()
            with self.record.phase("reduction"):
                self.engine.all_reduce_before_step(loss_and_flags, self._use_sums)
        self.accelerator.backward(loss * self.engine.loss_factor, **self.engine.backward_options)
        return loss.detach()

    def micro_batch_loss(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Return the sum over the micro-batch's target tokens, divided by the target tokens of the whole step.

        Added up over micro-batches and ranks it is the mean over the step's tokens, however they are spread.
        """
        outputs = model(**dataloaders.to_device(batch["inputs"], self.args.device))
        return cast(Tensor, -outputs.log_probs.sum() / batch["step_target_tokens"])

    def _skip_micro_batch(self) -> Tensor:
        """Free what a failed micro-batch left; its zeros take part in the step's reduction, which tells the others."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        if self.gradient_check:
            self.gradient_check.skipped = True
        if self.at_first_micro_batch:
            self._step_loss = torch.zeros((), device=self.args.device)
        return torch.zeros((), device=self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing: transformers' estimate knows neither the frozen base nor the vision tower."""
        return 0

    # --- reduction and clipping, once a step ----------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: `Trainer` calls this before the gradients are reduced. `_get_grad_norm` clips."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Reduce and clip; `Trainer` calls this before the optimizer step (`StepEnd` makes sure that it did).

        In place of DDP's buckets, which change after the first step: a resumed run would sum in another order.
        """
        if isinstance(self.engine, Zero):  # has reduced, clipped and stepped in the last backward
            self.grad_norm = self.engine.grad_norm(self._run_tower_ahead)
            check_step_taken(self.grad_norm, self.state.global_step + 1)
            return self.grad_norm
        self._check_gradients()
        loss_and_flags = self._loss_and_flags()
        with self.record.phase("reduction"):
            sums, norm = self.engine.all_reduce(loss_and_flags, self._run_tower_ahead)
        self._use_sums(sums, norm)
        self.engine.clip(self.recipe.training.max_grad_norm, self.grad_norm)
        return self.grad_norm

    def _loss_and_flags(self) -> Tensor:
        """Return this rank's loss of the step and its requests, which travel along in the step's reduction.

        All ranks read the same ones in the same step, with the wait for the GPU that a step needs anyway: what else the
        host has to do is done here, before it.
        """
        self.garbage.collect()
        self._read_ahead()
        flags_here = torch.tensor([0.0, *self.stop_requests.flags()])
        if self.args.device.type == "cuda":
            flags_here = flags_here.pin_memory()  # else its copy would wait for all that the GPU was given
        loss_and_flags = flags_here.to(self.args.device, non_blocking=True)
        loss_and_flags[0] = cast(Tensor, self._step_loss)
        self.record.wait_for_gpu()
        return loss_and_flags

    def _use_sums(self, sums: list[float], norm: float = float("nan")) -> None:
        """Take over what the ranks agree on: loss, requests, and the gradients' norm where it is known before the step.

        Raises on all ranks when one cannot go on or the numbers are not finite.
        """
        loss, *flags = sums
        self.agreed_requests = AgreedRequests.of(flags)
        if self.agreed_requests.fail:
            self.saver.wait()  # the rank that could not write, and why, is known to all in a moment
            raise self.stop_requests.agreed_failure()
        step = self.state.global_step
        known_norm = 0.0 if self.engine.steps_in_backward else norm
        check_finite(loss, known_norm, step + 1, self.step_plan.samples(step).tolist())
        self.loss, self.grad_norm, self._step_loss = loss, norm, None

    def _read_ahead(self) -> None:
        """Take the next step's first micro-batch and the features it lacks while the GPU computes this step.

        Read between two steps, the GPU would have nothing to do meanwhile; those of a step's other micro-batches are
        read while it computes the first. A rank that is asked to stop does not wait for data that nobody needs.
        """
        if self.training_loader is None or any(self.stop_requests.flags()):
            return
        with self.record.phase("data"):  # not part of the phase around it; the loader counts the waiting
            self.training_loader.read_ahead(
                partial(dataloaders.add_late_features, cache=self.encoder.features)
            )

    def _run_tower_ahead(self) -> None:
        """Give the GPU the tower of the micro-batch that was read ahead, before the host waits for this step's numbers.

        No collective, under no strategy: a rank that has no memory for it, or no other micro-batch, leaves it out.
        """
        if self.training_loader is None or not self.tower_runs_ahead:
            return
        if self.plan.parallelism.shards_layers:
            gather_from_here(self.model)
        ahead = partial(run_tower, model=self.model, device=self.args.device)
        try:
            with self.record.phase("launching"):
                self.training_loader.change_ready(ahead)
        except torch.OutOfMemoryError:  # each try makes PyTorch give its memory back, and wait for the GPU
            self.tower_runs_ahead = False
            logger.info("the vision tower runs ahead of its step no more: there is no memory for it")

    def _check_gradients(self) -> None:
        """In the first step, before the weights change: every adapter got its gradient. A collective."""
        if self.gradient_check:
            self.gradient_check.check()
            self.gradient_check = None

    # --- around the steps -----------------------------------------------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Wrap the model and make the optimizer, with checks that sharding and wrapping changed nothing.

        `Trainer` would then load DeepSpeed's own files, which want the world size that saved them.
        """
        with checked_wrapping(self, self._check_gradients):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            restore_optimizer(self, Path(resume_from_checkpoint))
        return prepared

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the validation loss; `Trainer`'s own is a mean over batches, padded ones among them."""
        return validation_loss(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: `StepEnd` logs the figures that the ranks agreed on."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Nothing: `StepEnd.on_save`, which `Trainer` calls next, saves a form that every strategy can read."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: `load_resumed_adapter` has done it, before the model was wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds itself."""
