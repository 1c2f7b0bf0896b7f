"""The tiny base model that has learnt to describe charts: what it is taught, by whom, on two processes."""

import io
import math
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import permutations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.multiprocessing
from PIL import Image
from torch.nn import functional
from transformers import (
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launch.errors import RunError
from launch.folders import published
from trainer.model.tiny import (
    SMALL_CORPUS,
    VISUAL_TOKEN_PIXELS,
    TinyShape,
    make_model,
    make_processor,
    train_tokenizer,
)

Progress = Callable[[int, int], None]
"""Called with (done, total) while a builder works."""

CHART_SHAPE = TinyShape(
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp=256,
    vision_width=64,
    vision_depth=2,
    vision_heads=2,
    vision_mlp_ratio=4,
    rope_theta=1e4,
    initializer_range=0.06,  # narrow layers learn nothing for long with the 0.02 of wide ones
    min_pixels=4 * VISUAL_TOKEN_PIXELS,
    max_pixels=64 * VISUAL_TOKEN_PIXELS,
)

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

MOST_NUMBERS = 2**20
"""Room for the gradient of the base (832,256 numbers) in the memory that two processes share."""

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


class Teacher:
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


def _same_size_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    scaling: float,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each of many images of one size: [1, heads, images * patches, width] in, transposed out."""
    heads, width = query.shape[1], query.shape[3]
    query, key, value = (
        tensor.view(heads, -1, module.patches_per_image, width) for tensor in (query, key, value)
    )
    out = functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return out.transpose(0, 1).transpose(1, 2).reshape(1, -1, heads, width), None


@contextmanager
def same_size_images(model: Qwen2VLForConditionalGeneration) -> Iterator[None]:
    """The tower's attention for batches of images of one size: one call instead of one an image."""
    ALL_ATTENTION_FUNCTIONS.register("same_size_images", _same_size_attention)
    config = model.config.vision_config
    usual, config._attn_implementation = config._attn_implementation, "same_size_images"
    try:
        yield
    finally:
        config._attn_implementation = usual


class Student:
    """A Qwen2-VL's own modules, called so that a batch of charts of one size goes through in few large products."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, grid: tuple[int, int]) -> None:
        self.model, self.grid = model, grid
        self.tower, self.text = model.model.visual, model.model.language_model
        patches = grid[0] * grid[1]
        for block in self.tower.blocks:
            block.attn.patches_per_image = patches
        within = torch.arange(patches).view(grid[0] // 2, grid[1] // 2, 2, 2)
        blocks = torch.meshgrid(*(torch.arange(n) for n in within.shape), indexing="ij")
        self.places = torch.stack([blocks[0] * 2 + blocks[2], blocks[1] * 2 + blocks[3]], dim=-1).view(-1, 2)

    def look(self, patches: torch.Tensor) -> torch.Tensor:
        """Visual tokens [images, tokens, hidden] of `patches` [images * patches, 588]."""
        images = len(patches) // len(self.places)
        # Both frames of the patch embedding see the same picture: their kernels add up to one matrix.
        kernel = self.tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
        hidden = functional.linear(patches, kernel)
        angles = self.tower.rotary_pos_emb(hidden, self.places.repeat(images, 1))
        ends = torch.tensor([0, len(hidden)])
        for block in self.tower.blocks:
            hidden = block(hidden, cu_seqlens=ends, position_embeddings=angles)
        seen: torch.Tensor = self.tower.merger(hidden)
        return seen.view(images, -1, seen.shape[-1])

    def positions(self, start: int, length: int) -> torch.Tensor:
        """M-RoPE positions [3, 1, length] of a sequence with one image from `start` on."""
        rows, columns = self.grid[0] // 2, self.grid[1] // 2
        after = start + rows * columns
        places = torch.arange(length).repeat(3, 1)
        places[0, start:after] = start
        places[1, start:after] = start + torch.arange(rows).repeat_interleave(columns)
        places[2, start:after] = start + torch.arange(columns).repeat(rows)
        places[:, after:] += max(rows, columns) - rows * columns
        return places[:, None]

    def loss(
        self, ids: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Cross entropy of the labelled tokens, summed up."""
        seen = self.look(patches)
        words = self.text.embed_tokens(ids)
        embeds = torch.cat([words[:, :start], seen, words[:, start + seen.shape[1] :]], dim=1)
        places = self.positions(start, ids.shape[1]).expand(-1, len(ids), -1)
        hidden = self.text(inputs_embeds=embeds, position_ids=places, use_cache=False).last_hidden_state
        asked = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][asked])
        return functional.cross_entropy(logits, labels[:, 1:][asked], reduction="sum")


@dataclass(frozen=True)
class Partner:
    """The other one of two processes that train the same base on a core each, as one of them sees it.

    Each writes the gradient of its half of a batch into memory that both see and says so through a pipe. When one
    of them ends, however it ends, the other reads the end of the pipe.
    """

    rank: int
    pipe: Connection
    shared: (
        torch.Tensor
    )  # [even and odd steps, ranks, numbers]: the other may still be reading the last step's

    def exchange(self, step: int, mine: torch.Tensor) -> list[torch.Tensor]:
        """What both ranks computed at `step`, rank 0's first."""
        place = self.shared[step % 2, :, : len(mine)]
        place[self.rank].copy_(mine)
        try:
            self.pipe.send_bytes(b"written")
            self.pipe.recv_bytes()
        except (EOFError, ConnectionError) as error:
            raise RunError("tiny base: one of its two processes was ended; run again") from error
        return list(place)


def teach(
    model: Qwen2VLForConditionalGeneration,
    teacher: Teacher,
    training: Training,
    progress: Progress | None = None,
    partner: Partner | None = None,
) -> list[float]:
    """Train every weight of `model`, tower included, in fp32; returns the loss of each step.

    A batch goes through in halves, one after the other or one here and one at the `partner`: the same sums.
    """
    student = Student(model, teacher.grid)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, training.rate_share)
    losses = []
    model.train()
    with same_size_images(model):
        for step in range(training.steps):
            batch = teacher.batch()
            if partner is None:
                halves = [_gradient(student, teacher, batch.half(which)) for which in (0, 1)]
            else:
                halves = partner.exchange(step, _gradient(student, teacher, batch.half(partner.rank)))
            losses.append(_set_gradient(model, halves[0] + halves[1]))
            if not math.isfinite(losses[-1]):  # also: no target token fitted into the batch
                raise RunError(
                    f"tiny base: the loss is {losses[-1]} (step {step + 1}); report this as a defect"
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, training.steps)
    model.eval()
    return losses


def _gradient(student: Student, teacher: Teacher, half: Batch) -> torch.Tensor:
    """One flat tensor: the gradients of the summed loss, parameter by parameter, that loss, its number of tokens."""
    student.model.zero_grad()
    loss = student.loss(half.ids, half.labels, teacher.patches(half.images), half.start)
    loss.backward()
    tokens = (half.labels[:, 1:] != -100).sum()
    gradients = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return torch.cat([*gradients, loss.detach().view(1), tokens.view(1)])


def _set_gradient(model: Qwen2VLForConditionalGeneration, flat: torch.Tensor) -> float:
    """Give every parameter its part of what `_gradient` made, for the mean loss of a token; returns that loss."""
    parameters = list(model.parameters())
    parts = (flat[:-1] / flat[-1]).split([*(p.numel() for p in parameters), 1])
    for parameter, part in zip(parameters, parts[:-1], strict=True):
        parameter.grad = part.view_as(parameter)
    return parts[-1].item()


def _school(charts: Path, training: Training) -> tuple[Qwen2VLForConditionalGeneration, Any, Teacher]:
    """(model, processor, teacher) at the start: the same in every process."""
    lessons = read_lessons(charts)
    tokenizer = train_tokenizer(corpus(lessons), vocab_size=1000)
    processor = make_processor(tokenizer, CHART_SHAPE)
    model = make_model(tokenizer, CHART_SHAPE, training.seed)
    return model, processor, Teacher(processor, lessons, training)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads, and the base must not."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@contextmanager
def _second_process(charts: Path, training: Training) -> Iterator[Partner | None]:
    """Another process that trains the same base; None where only one core may be used.

    When this process ends, even killed, the other reads the end of the pipe and ends too.
    """
    if len(os.sched_getaffinity(0)) < 2:
        yield None
        return
    shared = torch.zeros(2, 2, MOST_NUMBERS).share_memory_()
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_assist, args=(there, shared, charts, training), daemon=True)
    with _deaf_to_interrupts():
        process.start()
    there.close()
    try:
        yield Partner(0, here, shared)
    finally:
        here.close()
        process.terminate()  # it has nothing left to do, or it is still starting
        process.join()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A process started in here ignores Ctrl-C from its first instruction on: the terminal sends it to both."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change this
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _assist(pipe: Connection, shared: torch.Tensor, charts: Path, training: Training) -> None:
    """The second process: rank 1 of the training, whose model nobody needs. Ends quietly when rank 0 has ended."""
    torch.set_num_threads(1)
    model, _, teacher = _school(charts, training)
    with suppress(RunError):  # rank 0 says what happened
        teach(model, teacher, training, partner=Partner(1, pipe, shared))


def build_tiny(
    folder: Path, charts: Path, *, training: Training | None = None, progress: Progress | None = None
) -> None:
    """Write the trained tiny Qwen2-VL to `folder`; `charts` is a folder that `build_charts` wrote.

    The base describes charts and answers questions in whole sentences. It has not seen the short answers of the
    benchmark, nor any chart of its splits.
    """
    training = training or Training()
    with _one_thread(), _second_process(charts, training) as partner:
        model, processor, teacher = _school(charts, training)
        teach(model, teacher, training, progress, partner)
    with published(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
