"""What happens to the model between its loading and the first step: kernels, a resumed adapter, wrapping, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from peft import PeftModel

from launch.checkpoints.manifest import read_manifest
from launch.planning.plan import Plan
from launch.recipe.schema import Recipe
from trainer.checkpoint.saver import load_checkpoint
from trainer.checks.training import GradientCheck, check_launch, check_same_adapters
from trainer.checks.wrapping import ReferenceOutputs, compare_outputs, reference_outputs
from trainer.distributed.collectives import run_on_all_ranks
from trainer.engine.zero import Zero
from trainer.loop.dataloaders import shortest_sample, to_device, uncached
from trainer.model.base import RECIPE_DTYPES, compute_in, prepare_training
from trainer.task import Task
from trainer.vision_cache.writer import FeatureWriter

if TYPE_CHECKING:
    from trainer.loop.trainer import PlannedTrainer

logger = get_logger("trainer")


def prepare_model(model: PeftModel, recipe: Recipe, plan: Plan, features: FeatureWriter | None) -> None:
    """Choose kernels, recomputation and precision of the plan, and log the kernels."""
    dtype = RECIPE_DTYPES[plan.compute_dtype]
    kernels = prepare_training(
        model,
        recipe,
        compute_dtype=dtype,
        recompute_every=plan.settings.activation_checkpoint_every,
        resident_weights=plan.settings.keep_dequantized,
        keep=features.keep if features else None,
    )
    logger.info(kernels)
    compute_in(model, dtype)


def load_resumed_adapter(trainer: PlannedTrainer, checkpoint: str) -> None:
    """Load the adapter of the checkpoint that the run resumes at, before the model is wrapped. A collective.

    The optimizer state is kept until there is an optimizer for it: `restore_optimizer`.
    """
    shapes = {name: parameter.shape for name, parameter in trainer.parameters.items()}
    trainer.loaded_optimizer_state = run_on_all_ranks(
        lambda: load_checkpoint(trainer.model, shapes, Path(checkpoint))
    )
    check_same_adapters(trainer.parameters)
    trainer.state.global_step, trainer.state.max_steps = trainer.resumed_at, trainer.plan.max_steps


@contextmanager
def checked_wrapping(trainer: PlannedTrainer, check_gradients: Callable[[], None]) -> Iterator[None]:
    """Around the wrapping: the wrapped model computes what the whole one did, in the processes of the plan.

    `check_gradients` is called before DeepSpeed takes its first step; other engines ask before theirs. Collectives.
    """

    def sample() -> dict[str, Any]:
        packed = shortest_sample(trainer.task, uncached(trainer.encoder))
        return to_device(packed["inputs"], trainer.args.device)

    reference = _reference(trainer, sample)
    with trainer.engine.hide_unsharded_modules(trainer.model):
        yield
    trainer.model_wrapped.train()
    trainer.engine.attach(trainer.model_wrapped, trainer.optimizer.optimizer)
    run_on_all_ranks(lambda: check_launch(trainer.plan, trainer.accelerator, trainer.model_wrapped))
    if reference:
        compare_outputs(reference, trainer.model_wrapped, trainer.plan)
    trainer.gradient_check = GradientCheck(trainer.parameters)
    if isinstance(trainer.engine, Zero):
        trainer.engine.call_before_next_step(check_gradients)


def _reference(trainer: PlannedTrainer, read_sample: Callable[[], dict[str, Any]]) -> ReferenceOutputs | None:
    """Compute what the model says before it is wrapped; None where nothing is put around it. Collectives."""
    strategy = trainer.plan.parallelism
    if not strategy.is_compared_when_wrapped:
        return None
    sample = run_on_all_ranks(read_sample)
    if strategy.shards_layers:  # in the layers' collectives: what fails there ends the others by the launcher
        return reference_outputs(trainer.model, sample)
    return run_on_all_ranks(lambda: reference_outputs(trainer.model, sample))


def restore_optimizer(trainer: PlannedTrainer, checkpoint: Path) -> None:
    """Put the checkpoint's optimizer state into the optimizer, and the schedule at the step where the run goes on."""
    if trainer.loaded_optimizer_state is not None:  # an imported checkpoint may have none
        trainer.engine.load_optimizer_state(trainer.loaded_optimizer_state)
        trainer.loaded_optimizer_state = None
    rate = _resume_schedule(trainer.lr_scheduler, trainer.optimizer.param_groups, trainer.resumed_at)
    _log_changed_rate(trainer.task, checkpoint, trainer.resumed_at, rate)


def _resume_schedule(scheduler: Any, groups: Sequence[dict[str, Any]], step: int) -> float:
    """Set the optimizer's groups to the learning rate that the schedule has at `step`; returns it."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    for group, rule, base in zip(groups, scheduler.lr_lambdas, scheduler.base_lrs, strict=True):
        group["lr"] = base * rule(step)
    rate: float = groups[0]["lr"]
    return rate


def _log_changed_rate(task: Task, checkpoint: Path, step: int, rate: float) -> None:
    """Warn when the run was extended or has another schedule, so that the learning rate jumps."""
    before = read_manifest(checkpoint)["facts"]["learning_rate"]
    if rate != before:
        known = "another schedule" if before is None else f"{before:.4g}"
        logger.warning(
            f"the learning rate goes on at {rate:.4g} where the checkpoint's schedule had {known}: "
            f"{task.recipe.training.lr_scheduler_type} over {task.plan.max_steps} steps, at step {step}"
        )
