"""What the tiny base is taught: facts about charts, and the batches of conversations that a teacher makes of them."""

import io
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from trainer.embedded.tiny_model import SMALL_CORPUS

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a Vision Language Model, specialized in describing what charts show. Your task is to analyze the image "
    "provided and to respond to queries about its visual data. The charts include line charts, bar charts and a "
    "variety of other types, and contain text, labels and colors. Focus on interpreting the image: answers are "
    "delivering accurate information in whole sentences, based on the chart, usually with an additional explanation. "
    "Avoid a concise or succinct answer, such as a single word, number or short phrase, unless absolutely necessary.",
)
"""The second holds the words that a chart recipe's own message uses, so that they are single tokens."""

VISUAL_KINDS = {"count": 0.4, "colour of extreme": 0.4}
OTHER_KINDS = 0.03
"""How often a kind of question is asked, relative to the others, however many of it a chart allows.

The first two need no reading, and a minute on 2 cores teaches little more than these.
"""

CHANNEL_ORDERS = tuple(permutations(range(3)))


@dataclass(frozen=True)
class Lessons:
    """What the base learns from: charts of one size and facts about them."""

    images: torch.Tensor  # uint8 [charts, 3, height, width]
    captions: list[str]
    turns: list[list[tuple[str, str]]]  # of each chart: (question, sentence)
    weights: list[list[float]]  # how often each turn is taken, relative to the chart's others


@dataclass(frozen=True)
class Training:
    """How the tiny base is trained: numbers chosen by experiment for about 80 s on 2 free cores.

    A share `colours_first` of the steps teaches nothing but the colours of a chart: with captions and questions
    from the start, the words drown the picture and the model still answers without looking after 300 steps. Then
    a share `caption_share` of the batches describes charts, the others answer `turns` questions about each.
    """

    steps: int = 700
    batch: int = 16
    turns: int = 3
    turn_tokens: int = 96
    caption_tokens: int = 64
    caption_share: float = 0.25
    colours_first: float = 0.4
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0

    def rate_share(self, step: int) -> float:
        """The share of the learning rate at `step`: linear warm-up, then half a cosine down to nothing."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        past = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, past))


def read_lessons(charts: Path) -> Lessons:
    """The facts that the mini ChartQA keeps beside its splits, in `charts`/facts/facts.parquet."""
    table = pq.read_table(charts / "facts" / "facts.parquet").to_pydict()
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table["image"]]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    turns = [
        list(zip(q, s, strict=True)) for q, s in zip(table["questions"], table["sentences"], strict=True)
    ]
    weights = [
        [VISUAL_KINDS.get(kind, OTHER_KINDS) / kinds.count(kind) for kind in kinds]
        for kinds in table["kinds"]
    ]
    return Lessons(images, table["caption"], turns, weights)


def corpus(lessons: Lessons) -> list[str]:
    """Every text the base learns from, once: what its tokenizer is trained on."""
    told = [text for turns in lessons.turns for turn in turns for text in turn]
    return list(dict.fromkeys([*SYSTEM_MESSAGES, *SMALL_CORPUS, *lessons.captions, *told]))


def colour_names(order: Sequence[int]) -> dict[str, str]:
    """What the palette's colours are called after channel i of an image was taken from channel order[i]."""
    bits = {"Red": "100", "Green": "010", "Blue": "001", "Cyan": "011", "Magenta": "101", "Yellow": "110"}
    names = {code: name for name, code in bits.items()}
    renamed = {name: names["".join(code[channel] for channel in order)] for name, code in bits.items()}
    return renamed | {old.lower(): new.lower() for old, new in renamed.items()}


_COLOUR_WORD = re.compile(r"\b(?:red|green|blue|cyan|magenta|yellow)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Batch:
    """Conversations about one chart each."""

    ids: torch.Tensor  # [rows, tokens]
    labels: torch.Tensor  # [rows, tokens], -100 where nothing is asked
    images: torch.Tensor  # uint8 [rows, 3, height, width]
    start: int  # the first visual token of every row

    def half(self, which: int) -> "Batch":
        """The first (0) or second (1) half of the rows."""
        middle = len(self.ids) // 2
        rows = slice(None, middle) if which == 0 else slice(middle, None)
        return Batch(self.ids[rows], self.labels[rows], self.images[rows], self.start)


class BatchSampler:
    """Makes the training batches: conversations about random charts in random colours."""

    def __init__(self, processor: Any, lessons: Lessons, training: Training) -> None:
        self.lessons, self.training = lessons, training
        self.random = random.Random(training.seed)
        self.ids: dict[str, list[int]] = {}
        self.tokenizer = processor.tokenizer
        mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
        deviation = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
        self.mean, self.deviation = mean * 255, deviation * 255
        height, width = lessons.images.shape[2:]
        self.grid = (height // 14, width // 14)
        self.visual = self.grid[0] * self.grid[1] // 4
        self.order = self.random.sample(range(len(lessons.images)), len(lessons.images))
        self.place = self.batches = 0

    def encode(self, text: str) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text).input_ids
        return self.ids[text]

    def next_chart(self) -> int:
        if self.place == len(self.order):
            self.random.shuffle(self.order)
            self.place = 0
        self.place += 1
        return self.order[self.place - 1]

    def batch(self) -> Batch:
        """The next batch: the same ones in the same order for every teacher of one seed."""
        system = self.random.choices(SYSTEM_MESSAGES, (7, 1))[0]
        prefix = self.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|>")
        before = len(prefix) + self.visual
        describe = self.describes()
        told: list[list[int]] = []
        asked: list[list[int]] = []
        images = []
        for _ in range(self.training.batch):
            chart = self.next_chart()
            order = self.random.choice(CHANNEL_ORDERS)
            images.append(self.lessons.images[chart][list(order)])
            ids, labels = self.conversation(chart, colour_names(order), describe)
            told.append(prefix + [self.tokenizer.pad_token_id] * self.visual + ids)
            asked.append([-100] * before + labels)
        room = self.training.caption_tokens if describe else self.training.turn_tokens
        length = min(max(map(len, told)), before + room)
        return Batch(
            _rectangle(told, length, self.tokenizer.pad_token_id),
            _rectangle(asked, length, -100),
            torch.stack(images),
            len(prefix),
        )

    def describes(self) -> bool:
        """Whether the next batch describes charts (in the beginning every one) or answers questions."""
        self.batches += 1
        return self.in_the_beginning() or self.random.random() < self.training.caption_share

    def in_the_beginning(self) -> bool:
        return self.batches <= self.training.colours_first * self.training.steps

    def description(self, chart: int) -> tuple[str, str]:
        """The colours alone, which must be seen before anything else can be; later also the whole caption."""
        caption = self.lessons.captions[chart]
        if self.in_the_beginning() or self.random.random() < 0.7:
            return (
                "Which colours are there, the largest first?",
                f"{', '.join(_COLOUR_WORD.findall(caption))}.",
            )
        return "Describe the chart.", caption

    def conversation(self, chart: int, names: dict[str, str], describe: bool) -> tuple[list[int], list[int]]:
        """(ids, labels) of the turns about one chart: its description, or questions answered in whole sentences.

        Never both: a description gives the answers away without a look at the chart.
        """
        turns = [self.description(chart)] if describe else self.questions(chart)
        ids: list[int] = []
        labels: list[int] = []
        for place, turn in enumerate(turns):
            question, sentence = (_COLOUR_WORD.sub(lambda word: names[word[0]], text) for text in turn)
            opening = "<|vision_end|>" if place == 0 else "<|im_start|>user\n"
            told = self.encode(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n")
            answer = self.encode(f"{sentence}<|im_end|>")
            ids += told + answer + self.encode("\n")
            labels += [-100] * len(told) + answer + [-100]
        return ids, labels

    def questions(self, chart: int) -> list[tuple[str, str]]:
        """Some turns about `chart`, none twice (a repeated question is answered without a look), by their weights.

        Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006): the largest of u^(1 / weight).
        """
        keys = [self.random.random() ** (1 / weight) for weight in self.lessons.weights[chart]]
        taken = sorted(range(len(keys)), key=lambda turn: -keys[turn])[: self.training.turns]
        return [self.lessons.turns[chart][turn] for turn in taken]

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized patches of one frame in the processor's order: float32 [images * patches, 588]."""
        rows, columns = self.grid
        pixels = (images.float() - self.mean) / self.deviation
        pixels = pixels.view(-1, 3, rows // 2, 2, 14, columns // 2, 2, 14)
        return pixels.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3 * 14 * 14)


def _rectangle(rows: Sequence[list[int]], length: int, filler: int) -> torch.Tensor:
    """`rows` cut or filled up to `length`: int64 [rows, length]."""
    return torch.tensor([(row + [filler] * length)[:length] for row in rows])
