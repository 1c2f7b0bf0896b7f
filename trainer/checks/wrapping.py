"""A model that an engine has wrapped is what it was whole: its answers, and its layers where they are sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from launch.planning.plan import Plan
from launch.strategies import Strategy
from trainer.checks.sharding import LayerFacts, check_sharding, layer_facts
from trainer.checks.training import check_logits
from trainer.model.base import DTYPES
from trainer.model.layer_stand_ins import decoder_layers


@dataclass(frozen=True)
class ReferenceOutputs:
    """A model that no engine has wrapped yet: its answers to a sample, and its layers where they will be sharded."""

    sample: dict[str, Any]
    answers: Tensor
    layers: list[LayerFacts]


def whole_before_wrapping(
    model: PeftModel, strategy: Strategy, read_sample: Callable[[], dict[str, Any]]
) -> ReferenceOutputs | None:
    """What the model is while every rank has all of it; fsdp's was checked while it was loaded. No collectives."""
    if not strategy.wraps_whole_model:
        return None
    facts = [layer_facts(layer) for layer in decoder_layers(model)] if strategy.shards_layers else []
    sample = read_sample()
    return ReferenceOutputs(sample, _log_probs(model, sample), facts)


def compare_with_whole(
    whole: ReferenceOutputs | None, model: PeftModel, wrapped: nn.Module, plan: Plan
) -> None:
    """Wrapped as it was whole. Collectives.

    Raises:
        RunError: on all ranks: its answers or its layers have changed.
    """
    if whole is None:
        return
    if whole.layers:
        check_sharding(model, whole.layers, plan.world_size)
    answers = _log_probs(wrapped, whole.sample)
    check_logits(whole.answers, answers, DTYPES[plan.compute_dtype], gathered=bool(whole.layers))


@torch.no_grad()
def _log_probs(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    """Log-probabilities of the sample's targets, on the CPU. A wrapped model: all ranks at once."""
    was_training = model.training
    model.eval()
    answers: Tensor = model(**sample).log_probs
    model.train(was_training)
    return answers.cpu()
