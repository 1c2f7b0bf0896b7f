"""Base, adapters and trainer of a task, on this rank's device."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from launch.recipe.schema import Recipe
from trainer.checks.sharding import LayerFacts, check_sharding, layer_facts
from trainer.data.encoder import Encoder
from trainer.distributed.collectives import run_on_all_ranks
from trainer.distributed.stop_requests import StopRequests
from trainer.loop.callbacks import StepEnd
from trainer.loop.trainer import PlannedTrainer
from trainer.model.base import DTYPES, add_lora, load_base
from trainer.model.fsdp import close_sharding, mesh_of, shard_layer
from trainer.pretrained import load_processor
from trainer.startup_timer import FirstStep
from trainer.task import Task
from trainer.vision_cache.cache_key import facts_of, kind_of
from trainer.vision_cache.store import FeatureCache, describe, open_cache, remove_unused

logger = get_logger("trainer")


def build(
    task: Task, state: PartialState, watch: StopRequests, resumed_at: int, clock: FirstStep
) -> PlannedTrainer:
    """Base, LoRA and trainer on this rank's device.

    Raises:
        SamestepError: on all ranks together: what one rank alone can meet is met outside the collectives of sharding.
    """
    if task.recipe.training.deterministic:
        make_deterministic()
    encoder = run_on_all_ranks(
        lambda: Encoder(load_processor(task.recipe), task.recipe.data.system_message, task.recipe.data.loss)
    )
    clock.passed("processor")
    model = load_model(task, state.device)
    clock.passed("base")

    def finish() -> PlannedTrainer:
        kept = open_features(task.recipe, model, encoder.processor)
        return build_trainer(
            model,
            task,
            replace(encoder, features=kept, pixels=DTYPES[task.recipe.model.dtype]),
            watch,
            resumed_at,
            clock,
        )

    trainer = run_on_all_ranks(finish)
    clock.passed("trainer")
    return trainer


def build_trainer(
    model: PeftModel, task: Task, encoder: Encoder, watch: StopRequests, resumed_at: int, clock: FirstStep
) -> PlannedTrainer:
    """A trainer with its step callback attached, first in line so that the records precede reports and saves."""
    trainer = PlannedTrainer(model, task, encoder, watch, resumed_at, clock)
    trainer.callback_handler.callbacks.insert(0, StepEnd(trainer))
    return trainer


def open_features(recipe: Recipe, model: PeftModel, processor: Qwen2VLProcessor) -> FeatureCache | None:
    """The cache of vision features that the recipe asks for; `model` is as it was loaded."""
    place = recipe.data.vision_cache
    if place != "memory":
        remove_unused()
    if place == "off":
        return None
    tower = cast(Qwen2VLForConditionalGeneration, model.get_base_model()).model.visual
    facts = facts_of(recipe, tower, processor.image_processor)
    found = open_cache(place, kind_of(tower, facts), facts)
    for line in describe(found, facts):
        logger.info(line)
    return found


def load_model(task: Task, device: torch.device) -> PeftModel:
    """Base and LoRA; for fsdp every layer is sharded before the next is read, and checked when all are."""
    recipe, plan = task.recipe, task.plan
    if not plan.parallelism.shards_while_loading:
        return run_on_all_ranks(lambda: add_lora(load_base(recipe, device, plan.quant_storage), recipe))
    whole: list[LayerFacts] = []
    mesh = mesh_of(plan.world_size, device)

    def take(layer: nn.Module) -> None:
        whole.append(layer_facts(layer))
        shard_layer(layer, mesh)

    def read() -> PeftModel:
        model = add_lora(load_base(recipe, device, plan.quant_storage, take), recipe)
        close_sharding(model, mesh)
        return model

    model = run_on_all_ranks(read)
    check_sharding(model, whole, plan.world_size)
    return model


def make_deterministic() -> None:
    """The same bits on every repetition on the same GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
