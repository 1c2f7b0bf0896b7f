"""The answers of all models to all questions: one rank's share of the batches, each answer written as it comes.

Every rank holds a replica (generation under sharding waits for answers of unequal length). The batches do not depend on
the number of ranks; what is stored already is left out of its batch. Answers of the stock path do not depend on either.
On the path of packed prompts an image goes through the tower with others, which differ between ranks: its features, and
a token whose two best logits are as good as equal, may differ in rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.errors import RunError
from trainer.data.splits import open_split
from trainer.evaluation.answer_store import AnswerStore, question_id
from trainer.evaluation.loading import answering_as, load_replica, release
from trainer.evaluation.questions import Answer, Question, make_batches, other_images, read_questions
from trainer.evaluation.request import EvaluationTask, Variant, variants_of
from trainer.generation.replica import Replica
from trainer.pretrained import load_processor

BATCH_SIZE = 64  # of `evaluation.batch_size: auto`; a constant: the company of a question may break a tie
logger = logging.getLogger("trainer")


@dataclass(frozen=True)
class Stored:
    """The stored answers of one variant: where they are kept, and those that were there when the evaluation began."""

    store: AnswerStore
    answers: Mapping[str, str]


@dataclass(frozen=True)
class _Batch:
    """Questions, by position, that one variant answers together; `images`: the rows of the images it looks at."""

    variant: Variant
    positions: list[int]
    images: list[int]
    ids: list[str]


def answer_all(
    task: EvaluationTask, state: PartialState, stored: Mapping[str, Stored]
) -> tuple[list[Question], list[Answer]]:
    """Return the questions, and this rank's share of the answers, by the names of the variants."""
    processor = load_processor(task.recipe)
    rows = open_split(task.recipe, task.request.split)
    variants = variants_of(task.request, task.recipe)
    messages = {variant.prompt: variant.system_message for variant in variants if variant.prompt}
    questions = read_questions(task, processor, rows, messages)
    others = other_images(questions) if any(variant.shuffled for variant in variants) else []
    answers: list[Answer] = []
    # Two names may stand for the same weights: what one has answered, the other need not.
    known = {one.store.folder: dict(one.answers) for one in stored.values()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not state.is_main_process) as progress:
        for together in _loads(variants):
            share = list(_share(task, questions, others, together, state))
            total = sum(len(_left(batch, known[_store(stored, batch).folder]).ids) for batch in share)
            names = ", ".join(variant.name for variant in together)
            ranks = " (rank 0)" if state.num_processes > 1 else ""
            shown = progress.add_task(f"answers of {names}{ranks}", total=total, visible=total > 0)
            replica = load_replica(task, processor, rows, state.device, together) if total else None
            if replica is not None:
                if state.is_main_process:
                    logger.info(f"answers: by {replica.way}")
                replica.look_ahead(_images_of(share, stored, known))
            for batch in share:
                store = _store(stored, batch)
                there = known[store.folder]
                left = _left(batch, there)
                if left.ids and replica is not None:
                    predictions = _predictions(replica, left, questions)
                    new = dict(zip(left.ids, predictions, strict=True))
                    store.append(state.process_index, new.items())
                    there |= new
                answers += _answers(batch, questions, there)
                progress.advance(shown, len(left.ids))
            if replica is not None:
                replica.features.stop()
            del replica
            release()
    return questions, answers


def _images_of(
    batches: Sequence[_Batch], stored: Mapping[str, Stored], known: Mapping[Path, Mapping[str, str]]
) -> Iterator[int]:
    """The rows whose images are looked at, in the order in which they will be."""
    for batch in batches:
        yield from _left(batch, known[_store(stored, batch).folder]).images


def _store(stored: Mapping[str, Stored], batch: _Batch) -> AnswerStore:
    return stored[batch.variant.name].store


def _loads(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Who answers together: base and adapters are one model, the merged one is loaded after them."""
    groups = [[each for each in variants if each.is_merged == merged] for merged in (False, True)]
    return [group for group in groups if group]


def _share(
    task: EvaluationTask,
    questions: Sequence[Question],
    others: Sequence[int],
    variants: Sequence[Variant],
    state: PartialState,
) -> Iterator[_Batch]:
    """This rank's batches. Variants that see the same images take turns, while the features are there."""
    size = task.recipe.evaluation.batch_size
    for shuffled in (False, True):
        looking = [variant for variant in variants if variant.shuffled == shuffled]
        seen = [questions[other] for other in others] if shuffled and others else questions
        lengths = [
            question.text_tokens + shown.visual_tokens
            for question, shown in zip(questions, seen, strict=True)
        ]
        batches = make_batches(lengths, BATCH_SIZE if size == "auto" else size)
        for positions in batches[state.process_index :: state.num_processes]:
            for variant in looking:
                ids = [question_id(questions[p].prompt_of(variant.prompt), seen[p].image) for p in positions]
                yield _Batch(variant, positions, [seen[p].image_row for p in positions], ids)


def _left(batch: _Batch, known: Mapping[str, str]) -> _Batch:
    """What is still to be answered of a batch."""
    left = [number for number, id_ in enumerate(batch.ids) if id_ not in known]
    return _Batch(
        batch.variant,
        [batch.positions[number] for number in left],
        [batch.images[number] for number in left],
        [batch.ids[number] for number in left],
    )


def _answers(batch: _Batch, questions: Sequence[Question], known: Mapping[str, str]) -> list[Answer]:
    return [
        Answer(model=batch.variant.name, row=questions[position].row, image_row=image, prediction=known[id_])
        for position, image, id_ in zip(batch.positions, batch.images, batch.ids, strict=True)
    ]


def _predictions(replica: Replica, batch: _Batch, questions: Sequence[Question]) -> list[str]:
    prompts = [questions[position].prompt_of(batch.variant.prompt) for position in batch.positions]
    try:
        replica.forget_trained_features()
        with answering_as(replica.model, batch.variant):
            return replica.answers(prompts, batch.images)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"evaluation.batch_size: {len(prompts)} prompts are too many for this GPU's memory; "
            "set a smaller one in the run's recipe.yaml"
        ) from error
