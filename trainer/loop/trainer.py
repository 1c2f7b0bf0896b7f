"""trl's `SFTTrainer` with our data order, loss, gradient reduction and checkpoints.

What is overridden, and why: the loader (the step plan decides which samples, not a sampler), the loss (a sum over
the micro-batch divided by the target tokens of the whole step), the reduction (one flat fp32 all-reduce in name
order, because DDP's buckets change after the first step and a resumed run would sum in another order), clipping
(on that flat vector, with the step's one host read, which also brings what the ranks are asked for from outside),
and everything written to disk.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerControl
from trl import SFTTrainer

from launch.errors import RunError
from launch.planning.plan import Plan, samples_consumed
from launch.planning.run_steps import step_plan
from trainer import WATCHDOG
from trainer.checkpoint.saver import Saver, load_checkpoint, publish_adapter
from trainer.checks.training import (
    GradientCheck,
    check_adapters,
    check_finite,
    check_launch,
    check_same_adapters,
    check_step_taken,
    describe_targets,
)
from trainer.checks.wrapping import compare_with_whole, whole_before_wrapping
from trainer.data.encoder import Encoder
from trainer.data.loader import Loader
from trainer.data.micro_batches import EvaluationBatches, MicroBatches
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks, run_on_main
from trainer.distributed.stop_requests import AgreedRequests, StopRequests
from trainer.engine.replicated import Replicated
from trainer.engine.zero import Zero
from trainer.export.merge_plan import CARD
from trainer.export.model_card import adapter_card
from trainer.loop.dataloaders import (
    evaluation_batches,
    open_loader,
    scored_texts,
    shortest_sample,
    training_batches,
)
from trainer.loop.lr_schedule import enter_schedule, say_another_rate
from trainer.loop.progress import reporters
from trainer.loop.step_figures import memory_figures
from trainer.loop.training_args import training_arguments
from trainer.metrics_log import append_line, rows_digest, samples_digest
from trainer.model.base import DTYPES, compute_in, prepare_training, recompute_layers, trainable_parameters
from trainer.pretrained import base_name
from trainer.startup_timer import FirstStep
from trainer.task import Task
from trainer.vision_cache.writer import FeatureWriter

logger = get_logger("trainer")


def holds_all_weights(plan: Plan) -> bool:
    """Every rank computes a micro-batch by itself: nobody waits for it before the step's reduction."""
    return plan.parallelism.sharded == "nothing"


class PlannedTrainer(SFTTrainer):  # type: ignore[misc]
    """Runs a task's plan. `resumed_at`: optimizer steps done before, 0 for a new run."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        model: PeftModel,
        task: Task,
        encoder: Encoder,
        watch: StopRequests,
        resumed_at: int,
        clock: FirstStep,
    ) -> None:
        self.task, self.encoder, self.watch, self.resumed_at = task, encoder, watch, resumed_at
        self.clock = clock
        recipe, plan = self.recipe, self.plan = task.recipe, task.plan
        self.index, self.run_directory = task.index, task.run
        self.agreed, self.evaluation_given_up = AgreedRequests(), False
        self.steps = step_plan(recipe, task.index, plan)
        adapters = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
        super().__init__(
            model=model,
            args=training_arguments(recipe, plan, task.run.path),
            # Never read: trl wants a Dataset whose first row looks like an image row.
            train_dataset=Dataset.from_dict({"image": [0]}),
            eval_dataset=Dataset.from_dict({"image": [0]}),
            data_collator=lambda rows: rows,
            processing_class=encoder.processor,
            callbacks=reporters(task, resumed_at),
        )
        self.remove_callback(PrinterCallback)
        self.parameters = trainable_parameters(self.model)
        for name, parameter in self.parameters.items():
            parameter.data = adapters[name]  # trl 1.16 rounds those of a quantized model to bf16
        check_adapters(self.parameters)
        self._shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        stage = plan.parallelism.zero_stage
        self.engine = Zero(self.parameters, stage) if stage else Replicated(self.parameters)
        self.features = FeatureWriter(encoder.features, logger.warning) if encoder.features else None
        self._images = [0, 0]  # that this rank needed, and that the tower ran for
        way = prepare_training(
            self.model,
            recipe,
            compute_dtype=DTYPES[plan.compute_dtype],
            recompute_every=plan.settings.activation_checkpoint_every,
            resident_weights=plan.settings.keep_dequantized,
            keep=self.features.keep if self.features else None,
        )
        logger.info(way)
        compute_in(self.model, DTYPES[plan.compute_dtype])
        self.saver = Saver(recipe.checkpoint.format, self.model, self.engine, watch)
        self.publisher = self.saver.publisher
        self._training_data: Loader | None = None
        self._moments: dict[str, Tensor] | None = None
        self._loss_sum: Tensor | None = None
        self._host_values = (float("nan"), float("nan"))
        self._witness: GradientCheck | None = None
        self._out_of_memory = False
        self._clock = time.perf_counter()

    # --- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Loader:
        """The steps after the resumed one: the loader starts there, nothing is skipped."""
        batches = training_batches(self.task, self.encoder, self.steps, self.args.process_index)
        first = self.resumed_at * self.plan.micro_batches
        self._training_data = self._loader(batches, range(first, len(batches)))
        return self._training_data.begin()  # while the model is wrapped

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        """This rank's share of the validation samples."""
        batches = evaluation_batches(self.task, self.encoder, self.args.process_index)
        return self._loader(batches, range(len(batches)))

    def _loader(self, batches: MicroBatches | EvaluationBatches, numbers: range) -> Loader:
        self._wait_for_threads()  # data workers are forked, and must not inherit a lock
        return open_loader(batches, numbers, self.plan, pin_memory=self.args.device.type == "cuda")

    @property
    def computing_encoder(self) -> Encoder:
        """Every image through the tower, kept or not: the tower is guarded too, and the largest need is with it."""
        return replace(self.encoder, features=None)

    def _wait_for_threads(self) -> None:
        """Until nothing is being written beside this thread."""
        self.publisher.wait()
        if self.features:
            self.features.wait()

    def _prepare_inputs(self, inputs: Any) -> Any:
        device = self.args.device
        moved = {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in inputs["inputs"].items()
        }
        return {**inputs, "inputs": moved}

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None  # the index knows the step's target tokens

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' estimate knows neither the frozen base nor the tower."""
        return 0

    # --- one step -----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, gradients staying on this rank where the engine lets them."""
        WATCHDOG.micro_batch_begins()
        if self._witness and self._loss_sum is None:
            self._say_labels(inputs)
        if self._out_of_memory:  # known to all in this step's reduction
            return self._give_up_step()
        self._count_images(inputs)
        try:
            with self.engine.keep_gradients(self.accelerator, model):
                return self._forward_and_backward(model, inputs)
        except torch.OutOfMemoryError as error:
            if not holds_all_weights(self.plan):
                raise  # in the middle of a collective
            self.watch.fail(error)
        self._out_of_memory = True
        return self._give_up_step()

    def _forward_and_backward(self, model: nn.Module, inputs: Any) -> Tensor:
        """Of one micro-batch. `Trainer`'s own also walks over all modules to switch them to training mode.

        They are in it; with 7B parameters the GPU waits 8 ms a step for that walk.
        """
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        # DeepSpeed must not divide by the micro-batches: the loss is of the whole step.
        scaling = {"scale_wrt_gas": False} if isinstance(self.engine, Zero) else {}
        self.accelerator.backward(loss, **scaling)
        return loss.detach()

    def _count_images(self, inputs: Any) -> None:
        self._images[0] += len(inputs["inputs"]["text_lengths"])
        self._images[1] += len(inputs["inputs"]["fresh_grids"])

    def _give_up_step(self) -> Tensor:
        """Free what a failed micro-batch left; take part in the step's reduction, which tells the other ranks."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        if self._witness:
            self._witness.excused = True
        if self._loss_sum is None:
            self._loss_sum = torch.zeros((), device=self.args.device)
        return torch.zeros((), device=self.args.device)

    def take_plan(self, plan: Plan) -> None:
        """Train by a plan with other micro-batches and recomputation; before the first step."""
        self.plan, self.task = plan, replace(self.task, plan=plan)
        self.steps = step_plan(self.recipe, self.index, plan)
        self.args.gradient_accumulation_steps = plan.micro_batches
        recompute_layers(self.model, plan.settings.activation_checkpoint_every)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch of training, as the engine wants it for the backward.

        An engine that steps in its last backward must hear before it whether all ranks can take the step.
        """
        loss = self._loss(model, inputs)
        if self._loss_sum is None:
            self._loss_sum = torch.zeros((), device=loss.device)
        self._loss_sum += loss.detach()
        if self.engine.steps_in_backward and self.accelerator.sync_gradients:
            self._agree_on_step()
        return loss * self.engine.loss_factor

    def _loss(self, model: nn.Module, inputs: Any) -> Tensor:
        """Sum over the micro-batch's target tokens, divided by the target tokens of the whole step."""
        outputs = model(**inputs["inputs"])
        return cast(Tensor, -outputs.log_probs.sum() / inputs["step_target_tokens"])

    def _agree_on_step(self) -> float:
        """Add up loss, wishes and, where they are here, gradients over the ranks; returns the gradients' norm.

        The step's one host read. Raises on all ranks when one cannot go on or the numbers are not finite.
        """
        told = torch.tensor([0.0, *self.watch.wishes()], device=self.args.device)
        told[0] = cast(Tensor, self._loss_sum)
        (loss, *wished), norm = self.engine.add_up(told)
        self.agreed = AgreedRequests.of(wished)
        if self.agreed.fail:
            self.publisher.wait()  # the rank that could not write, and why, is known to all in a moment
            raise self.watch.agreed_failure()
        step = self.state.global_step
        known = 0.0 if self.engine.steps_in_backward else norm
        check_finite(loss, known, step + 1, self.steps.samples(step).tolist())
        self._host_values, self._loss_sum = (loss, norm), None
        return norm

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None  # with the reduction, in `_get_grad_norm`

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Agree on the step where the engine has not yet, and clip; `Trainer` asks before the optimizer step."""
        if isinstance(self.engine, Zero):
            norm = self.engine.norm()
            self._host_values = (self._host_values[0], norm)
            check_step_taken(norm, self.state.global_step + 1)
            return norm
        self._hear_witness()
        norm = self._agree_on_step()
        self.engine.clip(self.recipe.training.max_grad_norm, norm)
        return norm

    def _hear_witness(self) -> None:
        """Of the first step's gradients, before the weights change. A collective."""
        if self._witness:
            self._witness.check()
            self._witness = None

    def _say_labels(self, inputs: Any) -> None:
        """Rank 0 says for all what its first micro-batch scores, unless that is a filler; all fail with it."""
        tokenizer = self.encoder.processor.tokenizer

        def describe() -> str | None:
            if not (samples := inputs["samples"]):
                return None
            scored = scored_texts(self.task, self.encoder, samples)
            return describe_targets(inputs["inputs"], samples, scored, tokenizer)

        if said := broadcast_from_main(describe):
            logger.info(said)

    def check_reduced(self) -> None:
        """Before the weights change: `Trainer` has called `_get_grad_norm`, where the ranks are added up."""
        if self._loss_sum is not None:
            raise RunError(
                "transformers: its Trainer did not ask for the gradient norm before the optimizer step, so the "
                "gradients were not added up; install the versions of constraints.txt"
            )

    def write_step(self, learning_rate: float) -> None:
        """One line in `metrics.jsonl`, and every `logging_steps` one on the screen. Called at the end of a step."""
        step = self.state.global_step
        samples = self.steps.samples(step - 1)
        split = self.index.splits["train"]
        loss, norm = self._host_values
        self.state.epoch = samples_consumed(self.plan, step) / len(split)
        now = time.perf_counter()
        values = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "target_tokens": int(split.target_tokens[samples].sum()),
            "tokens": int(split.tokens[samples].sum()),
            "samples": len(samples),
            "samples_digest": self._digest_of(samples),
            "seconds": round(now - self._clock, 4),
            **memory_figures(),
        }
        self._record(self.run_directory.metrics_file, values)
        if step == self.resumed_at + 1:
            WATCHDOG.steps_begin()
            self._say_first_step()
        if step % self.recipe.training.logging_steps == 0 or step == self.plan.max_steps:
            shown = {key: values[key] for key in ("loss", "grad_norm", "learning_rate")}
            self.callback_handler.on_log(
                self.args, self.state, self.control, {**shown, "epoch": self.state.epoch}
            )
        self._clock = time.perf_counter()

    def _digest_of(self, samples: Any) -> str:
        """Of a step's samples, as this run names them."""
        if self.plan.samples_digest == "positions":
            return samples_digest(samples)
        digests = self.index.splits["train"].digests
        return rows_digest(digests[sample] for sample in samples)

    def _say_first_step(self) -> None:
        self.clock.passed("step")
        logger.info(self.clock.words())
        if self.is_world_process_zero():
            self.clock.keep(self.run_directory.environment_file)

    def _record(self, file: Path, values: dict[str, Any]) -> None:
        """Rank 0 writes a line; where it finds no room, all ranks hear of it in the next step and end together."""
        if not self.is_world_process_zero():
            return
        try:
            append_line(file, values)
        except OSError as error:
            self.watch.fail(error)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: steps and evaluations are written where they happen."""

    # --- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss per target token on the validation samples, each exactly once, into `evaluations.jsonl`.

        Given up when the run is asked to stop: the checkpoint is that of a step whose evaluation is missing, and
        whoever resumes there evaluates first.
        """
        if self.agreed.stop:
            self.evaluation_given_up = True
            return {}
        self.model.eval()
        sums = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        samples = 0
        for batch in self.get_eval_dataloader():
            self.agreed = self.watch.agree()
            if self.agreed.stop:
                self.evaluation_given_up = True
                self.model.train()
                self.control.should_save = self.control.should_training_stop = True
                return {}
            inputs = self._prepare_inputs(batch)
            self._count_images(inputs)
            sums[0] += self._loss(self.model, inputs)
            sums[1] += inputs["inputs"]["shift_labels"].numel()
            samples += len(batch["samples"])
        self.model.train()
        counted = torch.cat([sums, sums.new_tensor([samples])])
        if self.args.world_size > 1:
            dist.all_reduce(counted)
        total, tokens, seen = counted.tolist()
        values = {"step": self.state.global_step, "loss": total / tokens, "samples": int(seen)}
        self._record(self.run_directory.evaluations_file, values)
        shown = {"eval_loss": values["loss"]}
        self.callback_handler.on_log(self.args, self.state, self.control, shown)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, shown)
        self._clock = time.perf_counter()
        return shown

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The state is copied; threads write and publish it while the training goes on."""
        self.saver.save(self.task, self.state, self.optimizer.param_groups[0]["lr"], self.agreed.save)
        self._clock = time.perf_counter()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: `load` did, before anything was wrapped."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Wrap and make the optimizer; then restore what is ours, which DeepSpeed's own loading would not find."""
        whole = run_on_all_ranks(
            lambda: whole_before_wrapping(self.model, self.plan.parallelism, self._shortest_sample)
        )
        with self.engine.outside_training(self.model):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.model_wrapped.train()
        self.engine.started(self.model_wrapped, self.optimizer.optimizer)
        run_on_all_ranks(lambda: check_launch(self.plan, self.accelerator, self.model_wrapped))
        compare_with_whole(whole, self.model, self.model_wrapped, self.plan)
        self._witness = GradientCheck(self.parameters)
        if isinstance(self.engine, Zero):
            self.engine.before_next_step(self._hear_witness)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        self.clock.passed("wrapping")
        return prepared

    def _shortest_sample(self) -> dict[str, Any]:
        """Of the training split, as the model takes it."""
        packed = shortest_sample(self.task, self.computing_encoder)
        inputs: dict[str, Any] = self._prepare_inputs(packed)["inputs"]
        return inputs

    def _restore(self, checkpoint: Path) -> None:
        """Moments and step counts of a checkpoint, and the schedule at the step where the run goes on."""
        if self._moments is not None:  # else taken over from a form without them
            self.engine.restore(self._moments)
            self._moments = None
        rate = enter_schedule(self.lr_scheduler, self.optimizer.param_groups, self.resumed_at)
        say_another_rate(self.task, checkpoint, self.resumed_at, rate)

    def load(self, checkpoint: str) -> None:
        """Take the adapter of the checkpoint that the run is resumed at; before anything is wrapped.

        The moments are kept until there is an optimizer for them.
        """
        self._moments = run_on_all_ranks(lambda: load_checkpoint(self.model, self._shapes, Path(checkpoint)))
        check_same_adapters(self.parameters)
        self.state.global_step, self.state.max_steps = self.resumed_at, self.plan.max_steps

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds itself."""

    def finish(self) -> None:
        """At the end of an attempt, while the run is still ours and signals are wishes."""
        if self._training_data:
            self._training_data.close()
        self.publisher.wait()
        if not self.features:
            return
        self.features.close()
        seen, computed = self._images
        if seen:
            dropped = f", {self.features.dropped} dropped for want of time" if self.features.dropped else ""
            logger.info(
                f"vision features: {seen - computed} of {seen} images of rank 0 were there; "
                f"{self.features.kept} added{dropped}"
            )
        assert self.encoder.features is not None
        self.encoder.features.close()

    def save_final_adapter(self) -> None:
        """Write `adapter/`, replacing an older one whole: with the processor of the training, and a card."""
        weights, run, recipe = self.engine.weights(), self.run_directory, self.recipe

        def beside(folder: Path) -> None:
            self.encoder.processor.save_pretrained(str(folder))
            card = adapter_card(run, recipe, base_name(recipe), folder)
            (folder / CARD).write_text(card, encoding="utf-8")

        run_on_main(lambda: publish_adapter(self.model, run.adapter, weights, beside))
