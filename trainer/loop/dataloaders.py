"""What this rank reads: the micro-batches of the training steps and of an evaluation, and the loader of either."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.logging import get_logger

from launch.planning.plan import Plan
from launch.planning.run_steps import validation_samples
from launch.planning.step_plan import MicroBatch, StepPlan, assign, cost
from trainer.data.chartqa import open_split
from trainer.data.encoder import Encoder
from trainer.data.loader import Loader, data_workers
from trainer.data.micro_batches import EvaluationBatches, MicroBatches, PackedBatch, assemble
from trainer.data.worker_transport import choose_way
from trainer.task import Task

logger = get_logger("trainer")
_said: set[str] = set()


def training_batches(task: Task, encoder: Encoder, steps: StepPlan, rank: int) -> MicroBatches:
    """Of the whole run, by number."""
    return MicroBatches(open_split(task.recipe, "train"), task.index.splits["train"], encoder, steps, rank)


def evaluation_batches(task: Task, encoder: Encoder, rank: int) -> EvaluationBatches:
    """A rank's share of the validation samples, at most `evaluation.max_samples` evenly over the split."""
    split = task.index.splits["validation"]
    chosen = validation_samples(task.recipe, task.index)
    costs = cost(split.text_tokens, split.visual_tokens)
    budget = max(task.plan.micro_batch_tokens, int(split.tokens.max()))
    mine = assign(chosen, split.tokens, costs, task.plan.world_size, budget)[rank]
    return EvaluationBatches(open_split(task.recipe, "validation"), split, encoder, mine)


def open_loader(
    batches: MicroBatches | EvaluationBatches, numbers: range, plan: Plan, *, pin_memory: bool
) -> Loader:
    """Hands over the micro-batches `numbers`; its data workers, if any, are forked when it is read."""
    samples = plan.global_batch_size / plan.world_size / plan.micro_batches
    # Pixels of 16 samples are 0.2 GB of shared memory.
    ahead = max(1, min(4, round(16 / samples)))
    workers = data_workers(plan.gpus_per_node) if plan.data_workers is None else plan.data_workers
    way = choose_way(workers, ahead, round(samples * batches.sample_bytes()), plan.gpus_per_node)
    if way.said and way.said not in _said:
        _said.add(way.said)
        logger.warning(way.said)
    return Loader(
        batches,
        numbers,
        total=len(batches),
        workers=way.workers,
        pin_memory=pin_memory,
        ahead=ahead,
        by_pipe=way.by_pipe,
    )


def shortest_sample(task: Task, encoder: Encoder) -> PackedBatch:
    """Of the training split, alone in its micro-batch."""
    split = task.index.splits["train"]
    batch = MicroBatch((int(split.tokens.argmin()),), filler=False)
    return assemble(open_split(task.recipe, "train"), split, encoder, batch, -1, 1)


def scored_texts(task: Task, encoder: Encoder, samples: Sequence[int]) -> list[str | None]:
    """What training samples should score, see `Encoder.scored_text`: from their rows, not from their tokens."""
    rows, split = open_split(task.recipe, "train"), task.index.splits["train"]
    return [encoder.scored_text(rows[int(split.rows[sample])]) for sample in samples]
