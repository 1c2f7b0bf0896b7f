"""The evaluation of a training run: the loss per target token on the validation samples, and scored answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.evaluation.during_training import answers_are_due, score_answers
from trainer.loop.dataloaders import use_late_features

if TYPE_CHECKING:
    from trainer.loop.trainer import PlannedTrainer


@torch.no_grad()
def validation_loss(trainer: PlannedTrainer) -> dict[str, float]:
    """Evaluate each validation sample exactly once; `StepEnd` writes the result to `evaluations.jsonl`. A collective.

    An evaluation takes minutes, and a scheduler that wants the node back does not wait: where the run is asked to
    stop, it is interrupted and {} returned. The checkpoint is then that of a step whose evaluation is missing, and
    whoever resumes there evaluates first.
    """
    if trainer.agreed_requests.stop:
        trainer.evaluation_interrupted = True
        return {}
    trainer.model.eval()
    loss_and_tokens = torch.zeros(2, device=trainer.args.device, dtype=torch.float64)
    samples = 0
    for packed in trainer.get_eval_dataloader():
        if _must_stop(trainer):
            return _interrupt(trainer)
        batch = use_late_features(packed, trainer.encoder.features, trainer.features)
        loss_and_tokens[0] += trainer.micro_batch_loss(trainer.model, batch)
        loss_and_tokens[1] += batch["inputs"]["shift_labels"].numel()
        samples += len(batch["samples"])
    scored: dict[str, Any] = {}
    if answers_are_due(trainer.recipe, trainer.state.global_step, trainer.plan.max_steps):
        answers = score_answers(
            trainer.model,
            trainer.task,
            trainer.encoder.processor,
            trainer.engine.generating,
            lambda: _must_stop(trainer),
        )
        scored = {**(answers or {})}
    if trainer.agreed_requests.stop:
        return _interrupt(trainer)
    trainer.model.train()
    totals = torch.cat([loss_and_tokens, loss_and_tokens.new_tensor([samples])])
    if trainer.args.world_size > 1:
        dist.all_reduce(totals)
    loss, tokens, all_samples = totals.tolist()
    record = {"loss": loss / tokens, "samples": int(all_samples), **scored}
    shown = {f"eval_{key}": record[key] for key in ("loss", "accuracy") if key in record}
    handler, args, state = trainer.callback_handler, trainer.args, trainer.state
    # First the line on disk, then whoever shows it.
    trainer.control = handler.on_evaluate(args, state, trainer.control, record)
    handler.on_log(args, state, trainer.control, shown)
    return shown


def _must_stop(trainer: PlannedTrainer) -> bool:
    """Return whether any rank was asked to stop. A collective."""
    trainer.agreed_requests = trainer.stop_requests.agree()
    return trainer.agreed_requests.stop is not None


def _interrupt(trainer: PlannedTrainer) -> dict[str, float]:
    """Stop the run at this step, with a checkpoint."""
    trainer.evaluation_interrupted = True
    trainer.model.train()
    trainer.control.should_save = trainer.control.should_training_stop = True
    return {}
