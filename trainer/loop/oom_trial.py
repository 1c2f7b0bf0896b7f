"""Tries the largest micro-batch before the first step, and reduces settings that a GPU cannot hold.

The trial runs no collectives, whatever the strategy, so a rank that runs out of memory leaves nobody waiting: it comes
before anything is wrapped, and layers that will be sharded are replaced by zeros (`trainer.model.layer_stand_ins`).
What the trial leaves are compiled kernels: its gradients are dropped, and neither a generator nor a counter of the run
moves.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from accelerate.logging import get_logger
from numpy.typing import NDArray

from launch.errors import GpuMemoryError
from launch.planning.auto_settings import recomputation
from launch.planning.memory import bytes_of_first_step
from launch.planning.oom_fallback import plan_with_less
from launch.planning.plan import Plan
from launch.planning.run_steps import step_plan
from launch.planning.step_plan import MicroBatch
from launch.run.request_files import keep_plan
from trainer.data.encoder import Encoder
from trainer.data.loader import Loader, data_workers
from trainer.data.micro_batches import Batches, PackedBatch, assemble
from trainer.data.splits import open_split
from trainer.distributed.collectives import broadcast_from_main, gather_objects, run_on_all_ranks, run_on_main
from trainer.loop.dataloaders import uncached
from trainer.loop.kernels_ahead import products_of
from trainer.loop.trainer import PlannedTrainer
from trainer.model.base import recompute_layers
from trainer.model.fsdp import schedule_gathers
from trainer.model.layer_stand_ins import decoder_layers, layer_bytes, zero_weight_layers
from trainer.task import Task

logger = get_logger("trainer")
DEVICES = ("cuda",)
SPARE_SHARE = 0.02  # of a GPU's memory, kept free while trying: later micro-batches lie otherwise in it
FREE_SHARE = 0.1  # of a GPU's memory, left to other libraries after the trial
GATHERED_LAYERS = 3  # beside the one that computes: what it was taken from, and two on their way


def fit_to_memory(trainer: PlannedTrainer) -> None:
    """Reduce the plan's settings to some that all ranks can hold, and write them into plan.json. A collective.

    Raises:
        GpuMemoryError: on all ranks: the recipe allows nothing smaller, or only with weights that are loaded otherwise.
    """
    if trainer.plan.settings.tried or trainer.args.device.type not in DEVICES:
        return
    while not all(gather_objects(largest_micro_batch_fits(trainer))):
        smaller = broadcast_from_main(lambda: _smaller(trainer))
        _apply_plan(trainer, smaller)
        trainer.close_training_loader()  # whose micro-batches are those of the larger plan
        logger.warning(
            f"a GPU ran out of memory with the largest micro-batch: now {smaller.micro_batch_tokens:,} tokens, "
            f"{smaller.micro_batches} micro-batches a step, "
            f"recomputed: {recomputation(smaller.settings.activation_checkpoint_every)}"
        )
    _apply_plan(trainer, trainer.plan.with_settings(tried=True))
    run_on_main(lambda: keep_plan(trainer.run_directory, trainer.plan))


def _smaller(trainer: PlannedTrainer) -> Plan:
    setup = trainer.recipe, trainer.index, trainer.plan
    smaller = plan_with_less(*setup, reloading=False)
    if smaller is None:
        after_reloading = plan_with_less(*setup, reloading=True)
        raise GpuMemoryError(
            f"GPU: out of memory with the largest micro-batch ({trainer.plan.micro_batch_tokens:,} tokens); "
            + (
                "the same command goes on with 4-bit weights that are not held dequantized"
                if after_reloading
                else "the recipe allows nothing that needs less: set batch.micro_batch_tokens, "
                "training.gradient_checkpointing and model.resident_weights to auto"
                + ("" if trainer.plan.parallelism.shards_layers else ", or use --strategy fsdp")
            )
        )
    return smaller


def _apply_plan(trainer: PlannedTrainer, plan: Plan) -> None:
    """Train by a plan with other micro-batches and recomputation; before the first step."""
    trainer.plan, trainer.task = plan, replace(trainer.task, plan=plan)
    trainer.step_plan = step_plan(trainer.recipe, trainer.index, plan)
    trainer.args.gradient_accumulation_steps = plan.micro_batches
    recompute_layers(trainer.model, plan.settings.activation_checkpoint_every)
    if plan.parallelism.shards_layers:
        schedule_gathers(trainer.model, plan.settings.whole_layers)


def largest_micro_batch_fits(trainer: PlannedTrainer) -> bool:
    """Return whether this rank has memory for the forward and backward of the fullest micro-batch. A collective."""
    packed = run_on_all_ranks(lambda: _largest(trainer))
    return run_on_all_ranks(lambda: _holds(trainer, packed))


def _largest(trainer: PlannedTrainer) -> PackedBatch:
    begun, trainer.trial_batch = trainer.trial_batch, None
    if begun is None:
        return assemble_largest(trainer.task, trainer.encoder)
    try:
        return next(iter(begun))
    finally:
        begun.close()


class _TrialBatch(Batches):
    """The micro-batch of the trial, alone."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        self._task, self._encoder = task, encoder

    def __len__(self) -> int:
        return 1

    def batch(self, number: int) -> PackedBatch:
        return assemble_largest(self._task, self._encoder)


def begin_trial_batch(task: Task, encoder: Encoder, device: torch.device) -> Loader | None:
    """Assemble the trial's micro-batch, a second's work, in a data worker, while this process loads the base.

    Not in a thread: transformers loads under the base's dtype as PyTorch's default (`torch.set_default_dtype`, of all
    threads), in which its image processors would make, and keep, the mean by which they divide pixels.
    Returns None where nothing will be tried, or no core is there for it.
    """
    plan = task.plan
    workers = data_workers(plan.gpus_per_node) if plan.data_workers is None else plan.data_workers
    if plan.settings.tried or device.type not in DEVICES or not workers:
        return None
    batches = _TrialBatch(task, encoder)
    # Through the worker's pipe: it may be more than a container has of shared memory.
    return Loader(batches, range(1), total=1, workers=1, pin_memory=False, ahead=1, by_pipe=True).begin()


def assemble_largest(task: Task, encoder: Encoder) -> PackedBatch:
    """Fill a micro-batch of the plan as full as one can be; every image goes through the vision tower."""
    split = task.index.splits["train"]
    batch = largest_micro_batch(split.tokens, split.own_tokens, task.plan.micro_batch_tokens)
    return assemble(open_split(task.recipe, "train"), split, uncached(encoder), batch, 0, 1)


def _holds(trainer: PlannedTrainer, packed: PackedBatch) -> bool:
    device = trainer.args.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _forward_and_backward(trainer, packed)
        held = True
    except torch.OutOfMemoryError:
        held = False
    for parameter in trainer.parameters.values():
        parameter.grad = None
    gc.collect()  # the frames of the error held activations
    if device.type == "cuda" and not (held and _much_is_free(device)):
        torch.cuda.empty_cache()
    return held


def _much_is_free(device: torch.device) -> bool:
    """Whether NCCL and other libraries have room beside what PyTorch keeps of the trial for the first step.

    Giving 100 GB back to the driver and asking for them again takes more than a second. Ranks may differ in it: nothing
    that they do together depends on it.
    """
    free, total = torch.cuda.mem_get_info(device)
    return free >= FREE_SHARE * total


def _forward_and_backward(trainer: PlannedTrainer, packed: PackedBatch) -> None:
    device = trainer.args.device
    spare = torch.empty(_bytes_to_come(trainer), dtype=torch.uint8, device=device)
    trainer.model.train()
    with (
        zero_weight_layers(trainer.model, device)
        if trainer.plan.parallelism.shards_layers
        else nullcontext(),
        products_of(trainer, packed["samples"]) as trainer.seen_products,
    ):
        trainer.micro_batch_loss(trainer.model, packed).backward()
    del spare


def _bytes_to_come(trainer: PlannedTrainer) -> int:
    """Count the bytes not allocated yet: the optimizer's, those of gathered layers, and a spare share of the GPU."""
    plan, device = trainer.plan, trainer.args.device
    count = sum(parameter.numel() for parameter in trainer.parameters.values())
    size = bytes_of_first_step(plan.strategy, plan.world_size, count)
    if trainer.recheck:
        size += 4 * count  # the gradients of a micro-batch that is computed a second time
    if plan.parallelism.shards_layers:
        kept = plan.settings.whole_layers
        size += (GATHERED_LAYERS + kept) * layer_bytes(decoder_layers(trainer.model)[0])
    if device.type == "cuda":
        size += int(SPARE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return size


def largest_micro_batch(tokens: NDArray[np.int64], own: NDArray[np.int64], budget: int) -> MicroBatch:
    """Fill a micro-batch with samples whose row is long: positions in the split.

    `own`: their tokens besides a shared prefix. Those with the largest share of them come first, the longest of all
    where all have the prefix, or none has.
    """
    samples, left = [], budget
    for sample in np.lexsort((-tokens, -own / tokens)).tolist():
        if tokens[sample] <= left:
            samples.append(sample)
            left -= int(tokens[sample])
        if left < int(tokens.min()):
            break
    return MicroBatch(tuple(sorted(samples)), filler=False)
