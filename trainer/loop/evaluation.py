"""The evaluation of a training run: the loss per target token on the validation samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

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
    for batch in trainer.get_eval_dataloader():
        trainer.agreed_requests = trainer.stop_requests.agree()
        if trainer.agreed_requests.stop:
            trainer.evaluation_interrupted = True
            trainer.model.train()
            trainer.control.should_save = trainer.control.should_training_stop = True
            return {}
        if trainer.features:
            trainer.features.count(batch["inputs"])
        loss_and_tokens[0] += trainer.micro_batch_loss(trainer.model, batch)
        loss_and_tokens[1] += batch["inputs"]["shift_labels"].numel()
        samples += len(batch["samples"])
    trainer.model.train()
    totals = torch.cat([loss_and_tokens, loss_and_tokens.new_tensor([samples])])
    if trainer.args.world_size > 1:
        dist.all_reduce(totals)
    loss, tokens, all_samples = totals.tolist()
    metrics = {"eval_loss": loss / tokens}
    handler, control = trainer.callback_handler, trainer.control
    # First the line on disk, then whoever shows it.
    trainer.control = handler.on_evaluate(
        trainer.args, trainer.state, control, {**metrics, "eval_samples": int(all_samples)}
    )
    handler.on_log(trainer.args, trainer.state, trainer.control, metrics)
    return metrics
