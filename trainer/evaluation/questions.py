"""The questions of a split, the same on every rank, and what an answer is."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypedDict

from transformers import ProcessorMixin

from launch.errors import ConfigError
from launch.inputs.dataset_index import SPLITS
from trainer.data.encoder import Encoder
from trainer.data.row_errors import naming_row
from trainer.data.splits import Rows
from trainer.evaluation.request import EvaluationTask


@dataclass(frozen=True)
class Question:
    """One row of the split. `prompt` is the text of training up to where the answer begins.

    `prompts`: the same with other system messages, by the suffix of who is asked so; `image`: a digest of its image.
    """

    row: int
    query: str
    label: tuple[str, ...]
    human_or_machine: int | None
    prompt: str
    image_row: int  # the first of the rows asked that shows these images, this one included
    text_tokens: int
    visual_tokens: int
    images: int = 1
    image: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)

    def prompt_of(self, suffix: str) -> str:
        """Return the prompt with the system message that a suffix stands for."""
        return self.prompts[suffix] if suffix else self.prompt


class Answer(TypedDict):
    """What one model said to the question of one row, looking at the image of row `image_row`."""

    model: str
    row: int
    image_row: int
    prediction: str


def evenly_spaced(total: int, most: int | None) -> list[int]:
    """Return at most `most` positions of `total`, evenly spaced (all of them when None or more than there are)."""
    count = total if most is None else min(most, total)
    return [position * total // count for position in range(count)]


def read_questions(
    task: EvaluationTask,
    processor: ProcessorMixin,
    rows: Rows,
    messages: Mapping[str, str | None] = MappingProxyType({}),
) -> list[Question]:
    """Return the questions of the split, with the training prompt; rows that `prepare` dropped are left out.

    `messages`: other system messages that are wanted too, by the suffix that stands for them.
    """
    recipe, request = task.recipe, task.request
    split = task.index.splits[request.split]
    if not len(split):
        raise ConfigError(f"--split {request.split}: has no rows; choose one of {', '.join(SPLITS)}")
    encoder = Encoder(processor, recipe.data.system_message, recipe.data.loss)
    others = {suffix: replace(encoder, system_message=message) for suffix, message in messages.items()}
    questions, first_rows = [], dict[str, int]()
    for sample in evenly_spaced(len(split), request.max_samples):
        number = int(split.rows[sample])
        with naming_row(f"data: row {number} of the split"):
            row = rows[number]
            prompt = encoder.texts(row)[0]
            prompts = {suffix: other.texts(row)[0] for suffix, other in others.items()}
        image = row.images_digest
        questions.append(
            Question(
                row=number,
                query=row.query,
                label=tuple(row.label),
                human_or_machine=row.human_or_machine,
                prompt=prompt,
                image_row=first_rows.setdefault(image, number),
                text_tokens=int(split.text_tokens[sample]),
                visual_tokens=int(split.visual_tokens[sample]),
                images=len(row.images),
                image=image,
                prompts=prompts,
            )
        )
    return questions


def other_images(questions: Sequence[Question], seed: int = 0) -> list[int]:
    """Return, for every question, the position of one with other images, as many; the same for every call.

    The distinct images are put into one seeded cycle and each is replaced by its successor, so no question
    keeps its image, also where several questions share one. Questions without an image, and the only one with so many,
    stay as they are.
    """
    first: dict[int, dict[int, int]] = {}
    for position, question in enumerate(questions):
        first.setdefault(question.images, {}).setdefault(question.image_row, position)
    if not any(len(of_count) > 1 for count, of_count in first.items() if count):
        raise ConfigError(
            "--models shuffled: all questions are on one image, so that none can be exchanged; leave it out "
            "(--models base,adapter), or ask a split with more images (--split)"
        )
    successor: dict[int, int] = {}
    for count in sorted(first):
        cycle = list(first[count])
        if count:
            random.Random(seed).shuffle(cycle)
            successor |= zip(cycle, cycle[1:] + cycle[:1], strict=True)
        else:
            successor |= zip(cycle, cycle, strict=True)
    return [first[question.images][successor[question.image_row]] for question in questions]


def make_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return positions in batches of similar length, the longest first: the same for every number of ranks."""
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
