"""The tiny base model that has learnt to describe charts: its training, on two processes."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from transformers import Qwen2VLForConditionalGeneration

from launch.atomic_files import atomic_dir
from launch.errors import RunError
from trainer.embedded.pretrain_data import Batch, BatchSampler, Training, corpus, read_lessons
from trainer.embedded.pretrain_model import BatchedModel, same_size_images
from trainer.embedded.tiny_model import (
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

MOST_NUMBERS = 2**20
"""Room for the gradient of the base (832,256 numbers) in the memory that two processes share."""


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


def train_tiny(
    model: Qwen2VLForConditionalGeneration,
    teacher: BatchSampler,
    training: Training,
    progress: Progress | None = None,
    partner: Partner | None = None,
) -> list[float]:
    """Train every weight of `model`, tower included, in fp32; returns the loss of each step.

    A batch goes through in halves, one after the other or one here and one at the `partner`: the same sums.
    """
    student = BatchedModel(model, teacher.grid)
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


def _gradient(student: BatchedModel, teacher: BatchSampler, half: Batch) -> torch.Tensor:
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


def _setup(charts: Path, training: Training) -> tuple[Qwen2VLForConditionalGeneration, Any, BatchSampler]:
    """(model, processor, teacher) at the start: the same in every process."""
    lessons = read_lessons(charts)
    tokenizer = train_tokenizer(corpus(lessons), vocab_size=1000)
    processor = make_processor(tokenizer, CHART_SHAPE)
    model = make_model(tokenizer, CHART_SHAPE, training.seed)
    return model, processor, BatchSampler(processor, lessons, training)


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
    with _ignore_sigint():
        process.start()
    there.close()
    try:
        yield Partner(0, here, shared)
    finally:
        here.close()
        process.terminate()  # it has nothing left to do, or it is still starting
        process.join()


@contextmanager
def _ignore_sigint() -> Iterator[None]:
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
    model, _, teacher = _setup(charts, training)
    with suppress(RunError):  # rank 0 says what happened
        train_tiny(model, teacher, training, partner=Partner(1, pipe, shared))


def build_tiny(
    folder: Path, charts: Path, *, training: Training | None = None, progress: Progress | None = None
) -> None:
    """Write the trained tiny Qwen2-VL to `folder`; `charts` is a folder that `build_charts` wrote.

    The base describes charts and answers questions in whole sentences. It has not seen the short answers of the
    benchmark, nor any chart of its splits.
    """
    training = training or Training()
    with _one_thread(), _second_process(charts, training) as partner:
        model, processor, teacher = _setup(charts, training)
        train_tiny(model, teacher, training, progress, partner)
    with atomic_dir(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
