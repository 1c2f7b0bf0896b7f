"""Builds the base, the adapters and the trainer of a task on this rank's device, and closes what the trainer opened."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin

from launch.recipe.schema import Recipe
from trainer.checks.sharding import LayerReference, check_sharding, reference_layer
from trainer.data.encoder import Encoder
from trainer.distributed.collectives import run_on_all_ranks
from trainer.distributed.stop_requests import StopRequests
from trainer.loop.callbacks import StepEnd
from trainer.loop.oom_trial import begin_trial_batch
from trainer.loop.trainer import PlannedTrainer
from trainer.model.base import RECIPE_DTYPES, identify_compiler, load_base
from trainer.model.families.registry import feature_width
from trainer.model.fsdp import close_sharding, mesh_of, schedule_gathers, shard_layer
from trainer.model.lora import add_lora
from trainer.pretrained import load_processor
from trainer.startup_timer import StartupTimer
from trainer.task import Task
from trainer.vision_cache.cache_key import feature_facts, feature_kind
from trainer.vision_cache.store import FeatureCache, describe_cache, open_cache
from trainer.vision_cache.users import remove_unused

logger = get_logger("trainer")


def build(
    task: Task, state: PartialState, stop_requests: StopRequests, resumed_at: int, timer: StartupTimer
) -> PlannedTrainer:
    """Build base, LoRA and trainer on this rank's device.

    Raises:
        SamestepError: on all ranks together: what one rank alone can meet is met outside the collectives of sharding.
    """
    if task.recipe.training.deterministic:
        make_deterministic()
    encoder = run_on_all_ranks(
        lambda: Encoder(load_processor(task.recipe), task.recipe.data.system_message, task.recipe.data.loss)
    )
    encoder = replace(encoder, pixels=RECIPE_DTYPES[task.recipe.model.dtype])
    timer.record("processor")
    trial_batch = run_on_all_ranks(lambda: begin_trial_batch(task, encoder, state.device))
    with ExitStack() as on_failure:
        if trial_batch:
            on_failure.callback(trial_batch.close)
        # Its thread ends with the block: data workers that are forked later must not inherit a lock that it holds.
        with ThreadPoolExecutor(1, "beside-base") as beside:
            beside.submit(identify_compiler, state.device)
            model = load_model(task, state.device)
        timer.record("base")

        def finish() -> PlannedTrainer:
            features = open_features(task.recipe, model, encoder.processor)
            own = replace(encoder, features=features)
            return build_trainer(model, task, own, stop_requests, resumed_at, timer)

        trainer = run_on_all_ranks(finish)
        trainer.trial_batch = trial_batch
        on_failure.pop_all()
    timer.record("trainer")
    return trainer


def build_trainer(
    model: PeftModel,
    task: Task,
    encoder: Encoder,
    stop_requests: StopRequests,
    resumed_at: int,
    timer: StartupTimer,
) -> PlannedTrainer:
    """Build a trainer with its step callback attached, first in line so that the records precede reports and saves."""
    trainer = PlannedTrainer(model, task, encoder, stop_requests, resumed_at)
    trainer.callback_handler.callbacks.insert(0, StepEnd(trainer, timer))
    return trainer


def open_features(recipe: Recipe, model: PeftModel, processor: ProcessorMixin) -> FeatureCache | None:
    """Open the cache of vision features that the recipe asks for; `model` is as it was loaded."""
    place = recipe.data.vision_cache
    if place != "memory":
        remove_unused()
    if place == "off":
        return None
    base = cast(Any, model.get_base_model())
    tower = base.model.visual
    facts = feature_facts(recipe, tower, processor.image_processor)
    cache = open_cache(place, feature_kind(tower, feature_width(base), facts), facts)
    for line in describe_cache(cache, facts):
        logger.info(line)
    return cache


def load_model(task: Task, device: torch.device) -> PeftModel:
    """Load base and LoRA; layers that are shared out are each cut before the next is read, and checked when all are."""
    recipe, plan = task.recipe, task.plan
    if not plan.parallelism.shards_layers:
        return run_on_all_ranks(lambda: add_lora(load_base(recipe, device, plan.quant_storage), recipe))
    whole: list[LayerReference] = []
    mesh = mesh_of(plan.world_size, device)

    def take(layer: nn.Module) -> None:
        whole.append(reference_layer(layer))
        shard_layer(layer, mesh)

    def read() -> PeftModel:
        model = add_lora(load_base(recipe, device, plan.quant_storage, take), recipe)
        close_sharding(model, mesh)
        schedule_gathers(model, plan.settings.whole_layers)
        return model

    model = run_on_all_ranks(read)
    check_sharding(model, whole, plan.world_size)
    return model


def make_deterministic() -> None:
    """Choose kernels that give the same bits on every repetition on the same GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def close(trainer: PlannedTrainer) -> None:
    """End the threads and processes of an attempt, while the run is still locked and signals are requests."""
    trainer.close_training_loader()
    if trainer.trial_batch:
        trainer.trial_batch.close()
    trainer.saver.wait()
    if trainer.features:
        trainer.features.close()
        if summary := trainer.features.summary():
            logger.info(summary)
        assert trainer.encoder.features is not None
        trainer.encoder.features.close()
