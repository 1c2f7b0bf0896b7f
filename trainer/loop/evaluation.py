"""The evaluation of a training run: the loss per target token on the validation samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trainer.checkpoint.best import Verdict, judge
from trainer.evaluation.during_training import ScoredAnswers, answers_are_due, score_answers

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
        if _is_to_stop(trainer):
            return _interrupted(trainer)
        batch = trainer.with_late_features(packed)
        loss_and_tokens[0] += trainer.micro_batch_loss(trainer.model, batch)
        loss_and_tokens[1] += batch["inputs"]["shift_labels"].numel()
        samples += len(batch["samples"])
    answers = _score_answers(trainer)
    if trainer.agreed_requests.stop:
        return _interrupted(trainer)
    trainer.model.train()
    totals = torch.cat([loss_and_tokens, loss_and_tokens.new_tensor([samples])])
    if trainer.args.world_size > 1:
        dist.all_reduce(totals)
    loss, tokens, all_samples = totals.tolist()
    metrics = {"eval_loss": loss / tokens}
    if answers is not None:
        metrics["eval_accuracy"] = answers["accuracy"]
    handler, control = trainer.callback_handler, trainer.control
    # First the line on disk, then whoever shows it.
    trainer.control = handler.on_evaluate(
        trainer.args,
        trainer.state,
        control,
        {**metrics, "eval_samples": int(all_samples), "eval_answers": answers},
    )
    handler.on_log(trainer.args, trainer.state, trainer.control, metrics)
    _take_verdict(trainer, judge(trainer.task, trainer.state.global_step))
    return metrics


def _is_to_stop(trainer: PlannedTrainer) -> bool:
    """Whether some rank was asked to stop. A collective."""
    trainer.agreed_requests = trainer.stop_requests.agree()
    return trainer.agreed_requests.stop is not None


def _interrupted(trainer: PlannedTrainer) -> dict[str, float]:
    """Stop the run at this step, with a checkpoint; whoever resumes there evaluates first."""
    trainer.evaluation_interrupted = True
    trainer.model.train()
    trainer.control.should_save = trainer.control.should_training_stop = True
    return {}


def _score_answers(trainer: PlannedTrainer) -> ScoredAnswers | None:
    """Score validation answers, where this evaluation is to give some. A collective."""
    if not answers_are_due(trainer.recipe, trainer.state.global_step, trainer.plan.max_steps):
        return None
    processor, generating = trainer.encoder.processor, trainer.engine.generating
    return score_answers(trainer.model, trainer.task, processor, generating, lambda: _is_to_stop(trainer))


def _take_verdict(trainer: PlannedTrainer, verdict: Verdict) -> None:
    """Save what is best, and end a run that has stopped improving."""
    trainer.ended_early = verdict.ends
    trainer.control.should_save |= verdict.is_best or verdict.ends
    trainer.control.should_training_stop |= verdict.ends
