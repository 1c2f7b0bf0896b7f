"""trl's `SFTTrainer` with our data order, loss, gradient reduction and checkpoints.

What is overridden, and why: the loader (the step plan decides which samples, not a sampler), the loss (a sum over
the micro-batch divided by the target tokens of the whole step), the reduction (one flat fp32 all-reduce in name
order, because DDP's buckets change after the first step and a resumed run would sum in another order), clipping
(on that flat vector, with the step's one host read), and everything written to disk.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl
from trl import SFTConfig, SFTTrainer

from launch.errors import RunError
from launch.folders import published
from launch.index import Index
from launch.manifest import aside_folder, publish, rotate
from launch.plan import Plan, step_plan
from launch.recipe import Recipe
from launch.run_directory import RunDirectory
from launch.steps import cost, deal
from trainer.agreement import on_rank_0
from trainer.checkpoint.portable import load_adapter, load_optimizer, save_adapter, save_optimizer
from trainer.data.chartqa import open_split
from trainer.data.collate import Encoder, EvaluationBatches, Loader, MicroBatches, data_workers
from trainer.guards import check_adapters, check_finite, check_launch
from trainer.model.base import DTYPES, compute_in, prepare_training, trainable_parameters
from trainer.records import append_line, samples_digest
from trainer.reports import ProgressBar, Trackio

PASSED_ON = (
    "learning_rate",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "max_grad_norm",
    "seed",
)
"""Fields of the recipe's `training` that SFTConfig takes as they are."""


class PlannedTrainer(SFTTrainer):  # type: ignore[misc]
    """Runs a plan. `resumed_at`: optimizer steps done before, 0 for a new run; `base`: identity of the base model."""

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        model: PeftModel,
        recipe: Recipe,
        plan: Plan,
        index: Index,
        run: RunDirectory,
        encoder: Encoder,
        resumed_at: int,
        base: str,
    ) -> None:
        self.recipe, self.plan, self.index, self.run_directory, self.encoder = (
            recipe,
            plan,
            index,
            run,
            encoder,
        )
        self.resumed_at, self.base = resumed_at, base
        self.steps = step_plan(recipe, index, plan)
        adapters = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
        super().__init__(
            model=model,
            args=training_arguments(recipe, plan, run.path),
            # Never read: trl wants a Dataset whose first row looks like an image row.
            train_dataset=Dataset.from_dict({"image": [0]}),
            eval_dataset=Dataset.from_dict({"image": [0]}),
            data_collator=lambda rows: rows,
            processing_class=encoder.processor,
            callbacks=_callbacks(recipe, run, resumed_at),
        )
        self.remove_callback(PrinterCallback)
        self.parameters = trainable_parameters(self.model)
        for name, parameter in self.parameters.items():
            parameter.data = adapters[name]  # trl 1.16 rounds those of a quantized model to bf16
        check_adapters(self.parameters)
        prepare_training(self.model, recipe)
        compute_in(self.model, DTYPES[plan.compute_dtype])
        self._loss_sum: Tensor | None = None
        self._host_values = (float("nan"), float("nan"))
        self._clock = time.perf_counter()

    # --- data ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Loader:
        """The steps after the resumed one: the loader starts there, nothing is skipped."""
        rows = open_split(self.recipe, "train")
        split = self.index.splits["train"]
        batches = MicroBatches(rows, split, self.encoder, self.steps, self.args.process_index)
        return self._loader(batches, range(self.resumed_at * self.plan.micro_batches, len(batches)))

    def _loader(self, batches: MicroBatches | EvaluationBatches, numbers: range) -> Loader:
        return Loader(
            batches,
            numbers,
            total=len(batches),
            workers=data_workers(self.plan.gpus_per_node),
            pin_memory=self.args.device.type == "cuda",
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Loader:
        """This rank's share of the validation samples, at most `evaluation.max_samples` evenly over the split."""
        split = self.index.splits["validation"]
        count = min(self.recipe.evaluation.max_samples, len(split))
        chosen = np.linspace(0, len(split) - 1, count).round().astype(np.int64)
        costs = cost(split.text_tokens, split.visual_tokens)
        budget = max(self.plan.micro_batch_tokens, int(split.tokens.max()))
        mine = deal(chosen, split.tokens, costs, self.args.world_size, budget)[self.args.process_index]
        batches = EvaluationBatches(open_split(self.recipe, "validation"), split, self.encoder, mine)
        return self._loader(batches, range(len(batches)))

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
        """Forward and backward of one micro-batch, gradients staying on this rank."""
        if self._loss_sum is None:
            torch.manual_seed(step_seed(self.recipe.training.seed, inputs["step"], self.args.process_index))
            self._loss_sum = torch.zeros((), device=self.args.device)
        with self.accelerator.no_sync(model) if self.args.world_size > 1 else nullcontext():
            loss = cast(Tensor, super().training_step(model, inputs, num_items_in_batch))
        self._loss_sum += loss
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Sum over the micro-batch's target tokens, divided by the target tokens of the whole step."""
        outputs = model(**inputs["inputs"], fused_lm_head=True)
        return cast(Tensor, -outputs.log_probs.float().sum() / inputs["step_target_tokens"])

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None  # with the reduction, in `_get_grad_norm`

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """Add up gradients and loss over the ranks, look at both, clip. The step's one host read is here."""
        parts = [cast(Tensor, parameter.grad).reshape(-1) for parameter in self.parameters.values()]
        gradients = torch.cat([*parts, cast(Tensor, self._loss_sum)[None]])
        if self.args.world_size > 1:
            dist.all_reduce(gradients)
        flat, loss = gradients[:-1], gradients[-1]
        norm = torch.linalg.vector_norm(flat)
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        step = self.state.global_step
        check_finite(loss_value, norm_value, step + 1, self.steps.samples(step).tolist())
        if 0 < self.recipe.training.max_grad_norm < norm_value:
            flat.mul_(self.recipe.training.max_grad_norm / (norm_value + 1e-6))  # as torch's clip_grad_norm_
        start = 0
        for parameter in self.parameters.values():
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self._host_values, self._loss_sum = (loss_value, norm_value), None
        return cast(float, norm_value)

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
        self.state.epoch = step * self.plan.global_batch_size / len(split)
        now = time.perf_counter()
        values = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "target_tokens": int(split.target_tokens[samples].sum()),
            "tokens": int(split.tokens[samples].sum()),
            "samples": len(samples),
            "samples_digest": samples_digest(samples),
            "seconds": round(now - self._clock, 4),
        }
        if self.is_world_process_zero():
            append_line(self.run_directory.metrics_file, values)
        if step % self.recipe.training.logging_steps == 0 or step == self.plan.max_steps:
            shown = {key: values[key] for key in ("loss", "grad_norm", "learning_rate")}
            self.callback_handler.on_log(
                self.args, self.state, self.control, {**shown, "epoch": self.state.epoch}
            )
        self._clock = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: steps and evaluations are written where they happen."""

    # --- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss per target token on the validation samples, each exactly once, into `evaluations.jsonl`."""
        self.model.eval()
        sums = torch.zeros(2, device=self.args.device, dtype=torch.float64)
        samples = 0
        for batch in self.get_eval_dataloader():
            inputs = self._prepare_inputs(batch)
            sums[0] += self.compute_loss(self.model, inputs)
            sums[1] += inputs["inputs"]["shift_labels"].numel()
            samples += len(batch["samples"])
        self.model.train()
        counted = torch.cat([sums, sums.new_tensor([samples])])
        if self.args.world_size > 1:
            dist.all_reduce(counted)
        total, tokens, seen = counted.tolist()
        values = {"step": self.state.global_step, "loss": total / tokens, "samples": int(seen)}
        if self.is_world_process_zero():
            append_line(self.run_directory.evaluations_file, values)
        shown = {"eval_loss": values["loss"]}
        self.callback_handler.on_log(self.args, self.state, self.control, shown)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, shown)
        self._clock = time.perf_counter()
        return shown

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        on_rank_0(self._publish_checkpoint)
        self._clock = time.perf_counter()

    def _publish_checkpoint(self) -> None:
        step = self.state.global_step
        final = self.run_directory.checkpoint(step)
        aside = aside_folder(self.run_directory.path, step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_adapter(self.model, aside)
        save_optimizer(self.optimizer.optimizer, self.parameters, aside)
        self.state.save_to_json(str(aside / "trainer_state.json"))
        publish(aside, final, self._facts(step))
        rotate(self.run_directory.path, self.recipe.checkpoint.keep)

    def _facts(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "samples_consumed": step * self.plan.global_batch_size,
            "world_size": self.plan.world_size,
            "strategy": self.plan.strategy,
            "recipe_fingerprint": self.plan.recipe_fingerprint,
            "dataset_fingerprint": self.plan.dataset_fingerprint,
            "base_identity": self.base,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(self.optimizer.optimizer, self.parameters, Path(checkpoint))
        scheduler = self.lr_scheduler
        scheduler.last_epoch = self.resumed_at
        scheduler._step_count = self.resumed_at + 1
        groups = self.optimizer.param_groups
        for group, rule, base in zip(groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True):
            group["lr"] = base * rule(self.resumed_at)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step seeds itself."""

    def save_final_adapter(self) -> None:
        """Write `adapter/`, replacing an older one whole."""

        def write() -> None:
            with published(self.run_directory.adapter) as aside:
                save_adapter(self.model, aside)
                if self.run_directory.adapter.exists():
                    shutil.rmtree(self.run_directory.adapter)

        on_rank_0(write)


class _StepEnd(TrainerCallback):
    """Hands the moments of a step to the trainer."""

    def __init__(self) -> None:
        self.trainer: PlannedTrainer | None = None
        self._learning_rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        check_launch(self.trainer.plan, self.trainer.accelerator, self.trainer.model_wrapped)
        # A resumed state brings the cadence it was saved with.
        state.eval_steps, state.save_steps = args.eval_steps, args.save_steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.check_reduced()
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.write_step(self._learning_rate)


def build_trainer(
    model: PeftModel,
    recipe: Recipe,
    plan: Plan,
    index: Index,
    run: RunDirectory,
    encoder: Encoder,
    resumed_at: int,
    base: str = "",
) -> PlannedTrainer:
    """A trainer with its step callback attached, first in line so that the records precede reports and saves."""
    trainer = PlannedTrainer(model, recipe, plan, index, run, encoder, resumed_at, base)
    step_end = _StepEnd()
    step_end.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, step_end)
    return trainer


def _callbacks(recipe: Recipe, run: RunDirectory, resumed_at: int) -> list[TrainerCallback]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank != 0:
        return []
    callbacks: list[TrainerCallback] = [ProgressBar(resumed_at)]
    if recipe.tracking.report_to == "trackio":
        callbacks.append(Trackio(recipe, run))
    return callbacks


def training_arguments(recipe: Recipe, plan: Plan, output: Path) -> SFTConfig:
    """The SFTConfig of a plan. Everything that the plan, our loader or our loss owns is switched off here."""
    training = recipe.training
    arguments = SFTConfig(
        output_dir=str(output),
        **{name: getattr(training, name) for name in PASSED_ON},
        lr_scheduler_kwargs=training.lr_scheduler_kwargs or {},
        max_steps=plan.max_steps,
        warmup_steps=plan.warmup_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.micro_batches,
        bf16=False,  # precision is ours: `compute_in`
        activation_checkpointing=False,  # ours: `prepare_training`
        max_length=None,
        use_cpu=plan.device == "cpu",
        eval_strategy="steps",
        eval_steps=recipe.evaluation.every_steps,
        save_strategy="steps",
        save_steps=recipe.checkpoint.every_steps,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        ignore_data_skip=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    # Trainer counts every GPU it sees and would spread one process over them (`nn.DataParallel`).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one step on one rank: a resumed run draws what the straight one drew."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "big") >> 1
