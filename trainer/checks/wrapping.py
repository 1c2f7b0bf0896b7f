"""Checks that wrapping a model changed neither its outputs nor, where they are sharded, its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from launch.planning.plan import Plan
from launch.strategies import Strategy
from trainer.checks.sharding import LayerReference, check_sharding, reference_layer
from trainer.checks.training import check_logits
from trainer.model.base import RECIPE_DTYPES
from trainer.model.layer_stand_ins import decoder_layers


@dataclass(frozen=True)
class ReferenceOutputs:
    """The log-probabilities of a model before it is wrapped, and its layers where they will be sharded."""

    sample: dict[str, Any]
    log_probs: Tensor
    layers: list[LayerReference]


def reference_outputs(
    model: PeftModel, strategy: Strategy, read_sample: Callable[[], dict[str, Any]]
) -> ReferenceOutputs | None:
    """Compute the outputs while every rank has the whole model. No collectives.

    None where nothing is to be compared: fsdp's layers are checked while they are loaded.
    """
    if not strategy.wraps_whole_model:
        return None
    facts = [reference_layer(layer) for layer in decoder_layers(model)] if strategy.shards_layers else []
    sample = read_sample()
    return ReferenceOutputs(sample, _log_probs(model, sample), facts)


def compare_outputs(
    reference: ReferenceOutputs | None, model: PeftModel, wrapped: nn.Module, plan: Plan
) -> None:
    """Compare a wrapped model with what it was. Collectives.

    Raises:
        RunError: on all ranks: its outputs or its layers have changed.
    """
    if reference is None:
        return
    if reference.layers:
        check_sharding(model, reference.layers, plan.world_size)
    log_probs = _log_probs(wrapped, reference.sample)
    dtype = RECIPE_DTYPES[plan.compute_dtype]
    check_logits(reference.log_probs, log_probs, dtype, gathered=bool(reference.layers))


@torch.no_grad()
def _log_probs(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    """Compute the log-probabilities of the sample's targets, on the CPU. A collective if the model is wrapped."""
    was_training = model.training
    model.eval()
    log_probs: Tensor = model(**sample).log_probs
    model.train(was_training)
    return log_probs.cpu()
