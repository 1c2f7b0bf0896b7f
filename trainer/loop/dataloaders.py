"""The micro-batches that this rank reads, of the training steps and of an evaluation, and the loader of either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from launch.planning.plan import Plan
from launch.planning.run_steps import validation_samples, work_of_samples
from launch.planning.step_plan import MicroBatch, StepPlan, assign
from trainer.checks.training import describe_targets
from trainer.data.encoder import Encoder
from trainer.data.late_features import with_late_features
from trainer.data.loader import Loader, data_workers
from trainer.data.micro_batches import EvaluationBatches, MicroBatches, PackedBatch, assemble
from trainer.data.splits import open_split
from trainer.data.worker_transport import choose_way
from trainer.distributed.collectives import broadcast_from_main
from trainer.task import Task
from trainer.vision_cache.store import FeatureCache
from trainer.vision_cache.writer import FeatureWriter

logger = get_logger("trainer")
_warned: set[str] = set()  # of transports, once a process


def training_batches(task: Task, encoder: Encoder, steps: StepPlan, rank: int) -> MicroBatches:
    """Return this rank's micro-batches of the whole run, by number."""
    rows, split = open_split(task.recipe, "train"), task.index.splits["train"]
    return MicroBatches(rows, split, encoder, steps, rank, task.left_out)


def evaluation_batches(task: Task, encoder: Encoder, rank: int) -> EvaluationBatches:
    """Return a rank's share of the validation samples, at most `evaluation.max_samples` evenly over the split."""
    split = task.index.splits["validation"]
    samples = validation_samples(task.recipe, task.index)
    budget = max(task.plan.micro_batch_tokens, int(split.tokens.max()))
    mine = assign(samples, split.tokens, work_of_samples(split), task.plan.world_size, budget)[rank]
    return EvaluationBatches(open_split(task.recipe, "validation"), split, encoder, mine)


def open_loader(
    batches: MicroBatches | EvaluationBatches, numbers: range, plan: Plan, device: torch.device
) -> Loader:
    """Open a loader of the micro-batches `numbers`; its data workers, if any, are forked when it is read."""
    samples = plan.global_batch_size / plan.world_size / plan.micro_batches
    # Pixels of 16 samples are 0.2 GB of shared memory.
    ahead = max(1, min(4, round(16 / samples)))
    workers = data_workers(plan.gpus_per_node) if plan.data_workers is None else plan.data_workers
    way = choose_way(workers, ahead, round(samples * batches.sample_bytes()), plan.gpus_per_node)
    if way.notice and way.notice not in _warned:
        _warned.add(way.notice)
        logger.warning(way.notice)
    return Loader(
        batches,
        numbers,
        total=len(batches),
        workers=way.workers,
        pin_memory=device.type == "cuda",
        ahead=ahead,
        by_pipe=way.by_pipe,
    )


def shortest_sample(task: Task, encoder: Encoder) -> PackedBatch:
    """Return the shortest sample of the training split, alone in its micro-batch."""
    split = task.index.splits["train"]
    batch = MicroBatch((int(split.tokens.argmin()),), filler=False)
    return assemble(open_split(task.recipe, "train"), split, encoder, batch, -1, 1)


def uncached(encoder: Encoder) -> Encoder:
    """Return the encoder that leaves every image to the vision tower, cached or not.

    Checks guard the tower too, and a micro-batch needs the most memory with it.
    """
    return replace(encoder, features=None)


def add_late_features(batch: PackedBatch, cache: FeatureCache | None) -> PackedBatch:
    """Add the vision features that were cached since the data workers packed a micro-batch."""
    if cache is None or not batch["inputs"]["fresh_images"]:
        return batch
    return {**batch, "inputs": with_late_features(batch["inputs"], cache)}


def use_late_features(
    batch: PackedBatch, cache: FeatureCache | None, writer: FeatureWriter | None
) -> PackedBatch:
    """Add the features that came into the cache to the last moment to a micro-batch, and count its images."""
    if cache is None or writer is None:
        return batch
    batch = add_late_features(batch, cache)
    writer.count(batch["images"], len(batch["inputs"]["fresh_grids"]))
    return batch


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors among a micro-batch's inputs; from pinned memory without waiting for them."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }


def log_first_targets(task: Task, encoder: Encoder, batch: PackedBatch) -> None:
    """Check rank 0's first micro-batch against the texts that its samples should score, and log what it does.

    A filler has nothing to check. A collective, which raises on all ranks.
    """

    def describe() -> str | None:
        if not (samples := batch["samples"]) or task.left_out.at(batch["step"]).intersection(samples):
            return None
        rows, split = open_split(task.recipe, "train"), task.index.splits["train"]
        # From their rows, not from their tokens: the tokens are what is checked.
        expected = [encoder.scored_texts(rows[int(split.rows[sample])]) for sample in samples]
        return describe_targets(batch["inputs"], samples, expected, encoder.processor.tokenizer)

    if description := broadcast_from_main(describe):
        logger.info(description)
