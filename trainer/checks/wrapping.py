"""Checks that wrapping a model changed nothing that it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from launch.planning.plan import Plan
from trainer.checks.training import check_logits
from trainer.model.base import RECIPE_DTYPES


@dataclass(frozen=True)
class ReferenceOutputs:
    """The log-probabilities of a model before it is wrapped."""

    sample: dict[str, Any]
    log_probs: Tensor


def reference_outputs(model: PeftModel, sample: dict[str, Any]) -> ReferenceOutputs:
    """Compute the outputs of a model that is not wrapped yet. A collective where its layers are shared out."""
    return ReferenceOutputs(sample, _log_probs(model, sample))


def compare_outputs(reference: ReferenceOutputs, wrapped: nn.Module, plan: Plan) -> None:
    """Compare a wrapped model with what it was. Collectives.

    Raises:
        RunError: on all ranks: its outputs have changed.
    """
    log_probs = _log_probs(wrapped, reference.sample)
    check_logits(reference.log_probs, log_probs, RECIPE_DTYPES[plan.compute_dtype])


@torch.no_grad()
def _log_probs(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    """Compute the log-probabilities of the sample's targets, on the CPU. A collective if the model is wrapped."""
    was_training = model.training
    model.eval()
    log_probs: Tensor = model(**sample).log_probs
    model.train(was_training)
    return log_probs.cpu()
