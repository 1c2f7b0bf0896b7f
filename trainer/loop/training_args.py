"""The SFTConfig of a plan."""

from __future__ import annotations

from pathlib import Path

from trl import SFTConfig

from launch.planning.plan import Plan
from launch.recipe.schema import Recipe

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


def training_arguments(recipe: Recipe, plan: Plan, output: Path) -> SFTConfig:
    """Return the SFTConfig of a plan. Everything that the plan, our loader or our loss owns is switched off here."""
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
        # Said to accelerate 1.15, it would forget DeepSpeed on a CPU.
        use_cpu=plan.device == "cpu" and not plan.parallelism.is_zero,
        # transformers 5.23 makes the process state anew; see `init_process_group`.
        ddp_backend="gloo" if plan.device == "cpu" and plan.parallelism.is_zero else None,
        eval_strategy="no" if recipe.data.validation is None else "steps",
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
