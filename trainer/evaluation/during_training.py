"""Answers scored while a run trains: `evaluation.answers` questions of the validation split, on all ranks.

The model that trains answers, as it is wrapped: under `fsdp` and `zero3` a layer comes together when it is called, so
all ranks call it equally often. Every rank has as many batches, some of them repeated, and goes on generating until all
ranks are done (transformers' `synced_gpus`). The batches do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from launch.errors import RunError
from launch.recipe.schema import Recipe
from trainer.data.encoder import Encoder
from trainer.data.row_errors import naming_row
from trainer.data.splits import Rows, open_split
from trainer.distributed.collectives import gather_objects, run_on_all_ranks
from trainer.evaluation.metric_functions import Metrics, load_metrics
from trainer.evaluation.metrics import summary_of
from trainer.evaluation.questions import evenly_spaced, make_batches
from trainer.generation.replica import Replica, why_stock
from trainer.model.attention import stock_attention
from trainer.model.base import RECIPE_DTYPES
from trainer.task import Task

logger = logging.getLogger("trainer")
BATCH_SIZE = 8  # of `evaluation.batch_size: auto`: beside the training's memory


@dataclass(frozen=True)
class _Question:
    """A validation sample: its number in the split, the prompt, and what counts as right."""

    row: int
    prompt: str
    label: tuple[str, ...]
    human_or_machine: int | None
    tokens: int


class ScoredAnswers(TypedDict):
    """What a line of `evaluations.jsonl` says of them: `accuracy` in percent, and a digest of their texts."""

    accuracy: float
    correct: int
    answers: int
    answers_digest: str


def answers_are_due(recipe: Recipe, step: int, max_steps: int) -> bool:
    """Say whether the evaluation at a step scores answers too: every `answers_every`-th does, and the last one."""
    settings = recipe.evaluation
    return settings.answers > 0 and (
        step == max_steps or step % (settings.every_steps * settings.answers_every) == 0
    )


def score_answers(
    model: PeftModel,
    task: Task,
    processor: ProcessorMixin,
    generating: Callable[[PeftModel], AbstractContextManager[Any]],
    gives_up: Callable[[], bool],
) -> ScoredAnswers | None:
    """Score the model on `evaluation.answers` validation samples, by its first metric. A collective.

    `generating`: the engine's context around generation. `gives_up`: asked on all ranks before every batch; None is
    returned where it says so.
    """
    questions, mine = run_on_all_ranks(lambda: _share_of(task, processor))
    synced = task.plan.parallelism.shards_layers and task.plan.world_size > 1
    rows = open_split(task.recipe, "validation")
    base = cast(PreTrainedModel, model.get_base_model())
    stock = _why_stock(task, base)
    replica = Replica(
        model,
        processor,
        rows,
        task.recipe.evaluation.max_new_tokens,
        RECIPE_DTYPES[task.plan.compute_dtype],
        synced=synced,
        stock=stock,
    )
    _say(replica.way)
    predictions: dict[int, str] = {}
    with stock_attention(replica.base), generating(model), torch.no_grad():
        for positions, counts in mine:
            if gives_up():
                return None
            images = [questions[position].row for position in positions]
            # The tower is whole on every rank: what one alone can meet is met before the layers wait for each other.
            run_on_all_ranks(partial(_look, replica, images))
            prompts = [questions[position].prompt for position in positions]
            # In the middle of collectives: what fails here ends the other ranks through the launcher.
            if synced:
                answers = _answers(replica, prompts, images)
            else:
                answers = run_on_all_ranks(partial(_answers, replica, prompts, images) if counts else list)
            predictions |= dict(zip(positions, answers, strict=True)) if counts else {}
    gathered = {position: answer for part in gather_objects(predictions) for position, answer in part.items()}
    has_kinds = all(question.human_or_machine is not None for question in questions)
    return run_on_all_ranks(lambda: _score(questions, gathered, load_metrics(task.recipe, has_kinds)))


def _why_stock(task: Task, base: PreTrainedModel) -> str | None:
    if task.plan.parallelism.shards_layers:
        return "the layers are shared out"
    if task.recipe.checkpoint.keep_best == "accuracy":
        return "the best checkpoint is to be the same one under every strategy"
    return why_stock(base)


@cache
def _say(way: str) -> None:
    """Once, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info(f"evaluation.answers: by {way}")


def _answers(replica: Replica, prompts: Sequence[str], images: Sequence[int]) -> list[str]:
    with _naming_batch_size(len(prompts)):
        return replica.answers(prompts, images)


def _look(replica: Replica, rows: Sequence[int]) -> None:
    with _naming_batch_size(len(rows)):
        replica.features.of(rows)


@contextmanager
def _naming_batch_size(prompts: int) -> Iterator[None]:
    """Memory that an evaluation lacks is no reason to make the training's micro-batches smaller."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"evaluation.batch_size: {prompts} prompts are too many beside the training (GPU out of memory); the "
            "same command goes on with a smaller one, or with evaluation.answers: 0"
        ) from error


def _score(questions: Sequence[_Question], answers: Mapping[int, str], metrics: Metrics) -> ScoredAnswers:
    overall = summary_of(
        (metrics.is_correct(answers[position], question.label), question.human_or_machine)
        for position, question in enumerate(questions)
    )["overall"]
    assert overall["percent"] is not None  # a split without rows is refused before
    texts = json.dumps([answers[position] for position in range(len(questions))])
    return ScoredAnswers(
        accuracy=overall["percent"],
        correct=overall["correct"],
        answers=overall["count"],
        answers_digest=hashlib.sha256(texts.encode()).hexdigest()[:16],
    )


def _share_of(task: Task, processor: ProcessorMixin) -> tuple[list[_Question], list[tuple[list[int], bool]]]:
    """All questions, and this rank's batches of their positions; False: of another rank, to be in step with it."""
    questions = _questions(task, processor, open_split(task.recipe, "validation"))
    batch_size = task.recipe.evaluation.batch_size
    size = BATCH_SIZE if batch_size == "auto" else batch_size
    batches = make_batches([question.tokens for question in questions], size)
    rank = dist.get_rank() if task.plan.world_size > 1 else 0
    return questions, shares(batches, rank, task.plan.world_size)


def shares(batches: Sequence[list[int]], rank: int, world_size: int) -> list[tuple[list[int], bool]]:
    """Return a rank's batches, as many for each rank; those that only keep it in step repeat the last and are marked
    False.
    """
    mine = [(batch, True) for batch in batches[rank::world_size]]
    most = -(-len(batches) // world_size)
    return mine + [(batches[-1], False)] * (most - len(mine))


def _questions(task: Task, processor: ProcessorMixin, rows: Rows) -> list[_Question]:
    recipe, split = task.recipe, task.index.splits["validation"]
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    questions = []
    for sample in evenly_spaced(len(split), recipe.evaluation.answers):
        number = int(split.rows[sample])
        with naming_row(f"data: row {number} of the validation split"):
            row = rows[number]
            prompt = encoder.texts(row)[0]
        tokens = int(split.tokens[sample])
        questions.append(_Question(number, prompt, tuple(row.label), row.human_or_machine, tokens))
    return questions
