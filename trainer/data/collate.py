"""From rows to packed micro-batches: samples laid end to end in one row, without padding.

`position_ids` has shape [4, 1, T]: row 0 counts the text positions of each sample from 0, rows 1 to 3 are M-RoPE
(time, height, width) of each sample, the form that transformers' Qwen2-VL takes for packed input.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2VLProcessor
from transformers.vision_utils import get_vision_position_ids

from launch.errors import RunError, SamestepError
from launch.index import Split, row_digest
from launch.steps import MicroBatch, StepPlan
from trainer.data.chartqa import Row, Rows, chat, decode_image
from trainer.features.store import FeatureCache, name_of

IGNORED = -100
"""The label of a token that the loss does not count (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Sample:
    """One encoded sample of T tokens, P image patches and V = P / merge_size**2 visual tokens."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORED where the loss does not count
    positions: Tensor  # [3, T] int64, M-RoPE
    pixel_values: Tensor | None  # [P, channels * temporal_patch * patch * patch]; None: features are cached
    grid: tuple[int, int, int]  # patches in time, height, width
    features: Tensor | None = None  # [V, hidden], where they are cached
    image: str = ""  # its name in the cache of features, where there is one

    @property
    def target_tokens(self) -> int:
        """Scored tokens: labels that some earlier token predicts."""
        return int((self.labels[1:] != IGNORED).sum())


class ModelInputs(TypedDict):
    """What the packed forward takes, for N samples of T tokens together.

    Images come in two kinds: C whose features are cached (Vc visual tokens), and F fresh ones (P patches, Vf visual
    tokens), for which the tower runs.
    """

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [4, 1, T]
    sample_ids: Tensor  # [T] int64: the position in the split of the sample that a token belongs to
    step: int  # the optimizer step, counted from 0; -1 in an evaluation
    scored_positions: Tensor  # [K]: the tokens from which a target is predicted
    shift_labels: Tensor  # [1, K]: that target, the label of the *next* token
    text_cu_seqlens: Tensor  # [N + 1] int32
    text_lengths: tuple[int, ...]
    pixel_values: Tensor  # [P, patch features]
    image_grid_thw: Tensor  # [F, 3]
    fresh_positions: Tensor  # [Vf]: where their visual tokens lie in the row
    fresh_images: tuple[str, ...]  # F names in the cache of features; empty without one
    fresh_grids: tuple[tuple[int, int, int], ...]  # `image_grid_thw` once more, for the host
    vision_positions: Tensor  # [P, 2]: height and width of each patch, in merge order
    vision_cu_seqlens: Tensor  # [F + 1] int32
    vision_lengths: tuple[int, ...]
    cached_features: Tensor  # [Vc, hidden]
    cached_positions: Tensor  # [Vc]


class PackedBatch(TypedDict):
    """One micro-batch of one rank, and what the step knows about it."""

    inputs: ModelInputs
    step: int  # counted from 0
    step_target_tokens: int  # of the whole optimizer step, over all ranks
    samples: tuple[int, ...]  # positions in the split; empty for a filler


@dataclass(frozen=True)
class Encoder:
    """Turns rows into samples with the base model's processor.

    `features`: an image that is there is neither decoded nor processed; `pixels`: dtype of the others' patches, the
    tower's own, to which it would round them anyway.
    """

    processor: Qwen2VLProcessor
    system_message: str
    loss: str
    features: FeatureCache | None = None
    pixels: torch.dtype = torch.float32

    def __call__(self, row: Row) -> Sample:
        """Encode one row.

        Raises:
            RunError: the answer's first token merges with the prompt's last, so that no mask could part them.
        """
        prompt, text = self.texts(row)
        image = name_of(row.image) if self.features else ""
        cached = self.features.read(image) if self.features else None
        if cached is not None:
            input_ids, grid, pixels = self._ids(text, len(cached.values)), cached.grid, None
        else:
            encoded = self.processor(
                text=[text], images=[decode_image(row.image)], return_tensors="pt", add_special_tokens=False
            )
            input_ids, pixels = encoded["input_ids"][0], encoded["pixel_values"].to(self.pixels)
            grid = tuple(encoded["image_grid_thw"][0].tolist())
        labels = input_ids.clone()
        if self.loss == "answer":
            labels[: self.prompt_length(prompt, input_ids)] = IGNORED
        merge: int = self.processor.image_processor.merge_size
        return Sample(
            input_ids=input_ids,
            labels=labels,
            positions=mrope_positions(input_ids == self.processor.image_token_id, grid, merge),
            pixel_values=pixels,
            grid=grid,
            features=cached.values if cached else None,
            image=image,
        )

    def _ids(self, text: str, visual_tokens: int) -> Tensor:
        """Token ids [T] of a conversation with one image, as the processor makes them of text and pixels."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        place = ids.index(self.processor.image_token_id)
        return torch.tensor([*ids[:place], *[ids[place]] * visual_tokens, *ids[place + 1 :]])

    def texts(self, row: Row) -> tuple[str, str]:
        """The prompt up to where the answer begins, and the whole conversation, through the chat template."""
        render = self.processor.apply_chat_template
        prompt = render(
            chat(self.system_message, row, answer=False), tokenize=False, add_generation_prompt=True
        )
        text = render(chat(self.system_message, row, answer=True), tokenize=False)
        if not text.startswith(prompt):
            raise RunError(
                "model: its chat template does not begin a conversation with the prompt it generates from"
            )
        return prompt, text

    def prompt_length(self, prompt: str, input_ids: Tensor) -> int:
        """Tokens before the answer, visual ones included."""
        prompt_ids = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        visual = int((input_ids == self.processor.image_token_id).sum())
        length = len(prompt_ids) - 1 + visual
        if prompt_ids[-2:] != input_ids[length - 2 : length].tolist():
            raise RunError(f"data: the answer merges with the prompt {prompt[-20:]!r} in the tokenizer")
        return length


def mrope_positions(is_image: Tensor, grid: tuple[int, int, int], merge: int) -> Tensor:
    """M-RoPE positions [3, T] of a sample with one image.

    Text counts on all three axes together; a visual token has the text position where the image begins plus its own
    (time, height, width); the text after it goes on from the largest position so far.
    Source: Qwen2-VL (arXiv 2409.12191, section 2.1); tested against `Qwen2VLModel.get_rope_index`.
    """
    time, height, width = grid[0], grid[1] // merge, grid[2] // merge
    begin = int(is_image.nonzero()[0])
    visual = time * height * width
    after = len(is_image) - begin - visual
    head = torch.arange(begin).expand(3, -1)
    image = torch.stack(
        torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
    )
    tail = torch.arange(after).expand(3, -1) + begin + max(time, height, width)
    return torch.cat([head, image.reshape(3, -1) + begin, tail], dim=1)


def pack(
    samples: Sequence[Sample],
    *,
    sample_ids: Sequence[int],
    step: int,
    masked: bool,
    image_token_id: int,
    merge: int,
) -> ModelInputs:
    """Lay samples end to end. `masked` scores no token: a filler, which runs and weighs nothing.

    `sample_ids`: their positions in the split, which choose their dropout masks together with `step`.
    """
    input_ids = torch.cat([sample.input_ids for sample in samples])
    next_labels = torch.cat([_next_labels(sample.labels) for sample in samples])
    scored = next_labels.new_empty(0) if masked else (next_labels != IGNORED).nonzero()[:, 0]
    text_positions = torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])
    positions = torch.cat([sample.positions for sample in samples], dim=1)
    text_lengths = tuple(len(sample.input_ids) for sample in samples)
    is_visual = input_ids == image_token_id
    is_cached = torch.tensor([sample.features is not None for sample in samples])
    is_cached = is_cached.repeat_interleave(torch.tensor(text_lengths))
    return ModelInputs(
        input_ids=input_ids[None],
        position_ids=torch.cat([text_positions[None], positions])[:, None],
        sample_ids=torch.tensor(sample_ids).repeat_interleave(torch.tensor(text_lengths)),
        step=step,
        scored_positions=scored,
        shift_labels=next_labels[scored][None],
        text_cu_seqlens=cumulative(text_lengths),
        text_lengths=text_lengths,
        fresh_positions=(is_visual & ~is_cached).nonzero()[:, 0],
        cached_positions=(is_visual & is_cached).nonzero()[:, 0],
        cached_features=_joined([sample.features for sample in samples]),
        **_pack_fresh([sample for sample in samples if sample.features is None], merge),
    )


class _FreshImages(TypedDict):
    """The part of `ModelInputs` that the tower takes."""

    pixel_values: Tensor
    image_grid_thw: Tensor
    fresh_images: tuple[str, ...]
    fresh_grids: tuple[tuple[int, int, int], ...]
    vision_positions: Tensor
    vision_cu_seqlens: Tensor
    vision_lengths: tuple[int, ...]


def _pack_fresh(samples: Sequence[Sample], merge: int) -> _FreshImages:
    """The images of samples without cached features, end to end; empty tensors for none."""
    grids = torch.tensor([sample.grid for sample in samples], dtype=torch.int64).view(-1, 3)
    lengths = tuple(grid[1] * grid[2] for grid in grids.tolist() for _ in range(grid[0]))
    return _FreshImages(
        pixel_values=_joined([sample.pixel_values for sample in samples]),
        image_grid_thw=grids,
        fresh_images=tuple(sample.image for sample in samples if sample.image),
        fresh_grids=tuple(sample.grid for sample in samples),
        vision_positions=get_vision_position_ids(grids, merge) if samples else grids.new_empty(0, 2),
        vision_cu_seqlens=cumulative(lengths),
        vision_lengths=lengths,
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    """The tensors among `parts` end to end, an empty one for none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else torch.empty(0)


def _next_labels(labels: Tensor) -> Tensor:
    """The label of the token after each; none after a sample's last, whatever lies behind it in the row."""
    return torch.cat([labels[1:], labels.new_tensor([IGNORED])])


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Sequence boundaries [N + 1], int32, as variable-length attention takes them."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class _Batches(Dataset["PackedBatch | SamestepError"]):
    """Micro-batches by number. An error is handed over as a value: raised in a data worker, it would come out
    with the worker's traceback for a message (`torch._utils.ExceptionWrapper`, 2.14)."""

    def __getitem__(self, number: int) -> PackedBatch | SamestepError:
        try:
            return self.batch(number)
        except SamestepError as error:
            return error

    def batch(self, number: int) -> PackedBatch:
        """Micro-batch `number`."""
        raise AssertionError("every kind of micro-batches makes its own")


class MicroBatches(_Batches):
    """This rank's micro-batches of a step plan by number: number i is micro-batch i % M of step i // M."""

    def __init__(self, rows: Rows, split: Split, encoder: Encoder, plan: StepPlan, rank: int) -> None:
        self._rows, self._split, self._encoder, self._plan, self._rank = rows, split, encoder, plan, rank
        self._step: tuple[int, Sequence[MicroBatch]] = (-1, [])

    def __len__(self) -> int:
        return self._plan.max_steps * self._plan.micro_batches

    def batch(self, number: int) -> PackedBatch:
        """The micro-batch, packed."""
        step, position = divmod(number, self._plan.micro_batches)
        if self._step[0] != step:
            self._step = (step, self._plan.micro_batches_of(step, self._rank))
        target_tokens = int(self._split.target_tokens[self._plan.samples(step)].sum())
        return assemble(self._rows, self._split, self._encoder, self._step[1][position], step, target_tokens)


class EvaluationBatches(_Batches):
    """This rank's micro-batches of an evaluation."""

    def __init__(self, rows: Rows, split: Split, encoder: Encoder, batches: Sequence[MicroBatch]) -> None:
        self._rows, self._split, self._encoder, self._batches = rows, split, encoder, batches

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, number: int) -> PackedBatch:
        """The micro-batch, packed; it belongs to no step."""
        return assemble(self._rows, self._split, self._encoder, self._batches[number], -1, 1)


def assemble(
    rows: Rows, split: Split, encoder: Encoder, batch: MicroBatch, step: int, step_target_tokens: int
) -> PackedBatch:
    """Read, decode, encode and pack the samples of a micro-batch, checked against the index.

    Raises:
        RunError: a row is not the one the index was made of, or its token counts are others, so that the loss
            would be normalized wrongly.
    """
    read = [_read(rows, split, sample) for sample in batch.samples]
    for number, row in zip(batch.samples, read, strict=True):
        if row_digest(row.image, row.query, row.label) != split.digests[number]:
            raise RunError(
                f"data: sample {number} (row {split.rows[number]}) is not what `samestep prepare` saw; "
                "the data changed since: prepare it again, under another run name"
            )
    samples = [encoder(row) for row in read]
    for number, sample in zip(batch.samples, samples, strict=True):
        found = (len(sample.input_ids), sample.target_tokens)
        indexed = (int(split.tokens[number]), int(split.target_tokens[number]))
        if found != indexed:
            raise RunError(
                f"data: sample {number} (row {split.rows[number]}) has {found[0]} tokens of which {found[1]} are "
                f"targets, the index says {indexed[0]} and {indexed[1]}; the libraries changed since `samestep prepare`"
            )
    processor = encoder.processor
    return PackedBatch(
        inputs=pack(
            samples,
            sample_ids=batch.samples,
            step=step,
            masked=batch.filler,
            image_token_id=processor.image_token_id,
            merge=processor.image_processor.merge_size,
        ),
        step=step,
        step_target_tokens=step_target_tokens,
        samples=() if batch.filler else tuple(batch.samples),
    )


def _read(rows: Rows, split: Split, sample: int) -> Row:
    try:
        return rows[int(split.rows[sample])]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"data: sample {sample} (row {split.rows[sample]}) cannot be read ({type(error).__name__}: {error}); "
            "the data changed or went away since `samestep prepare`"
        ) from error


def data_workers(processes_per_node: int) -> int:
    """Data workers of one rank: its share of the cores this process may run on, at most 8; 0 when none is to spare."""
    cores = len(os.sched_getaffinity(0))
    return max(0, min(8, cores // processes_per_node - 1))


class _Numbers(torch.utils.data.Sampler[int]):
    def __init__(self, numbers: range) -> None:
        self._numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class Loader:
    """Micro-batches in the given order, decoded ahead in `workers` processes (0: in this one).

    Its length is that of the whole run, `total`: `Trainer` derives the steps of its one "epoch" from it, also when
    the run is resumed in the middle. `ahead`: micro-batches that each worker has ready or in work.
    """

    def __init__(
        self,
        batches: _Batches,
        numbers: range,
        *,
        total: int,
        workers: int,
        pin_memory: bool,
        ahead: int = 4,
    ) -> None:
        self._total = total
        if workers:
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)
        self._loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,
            sampler=_Numbers(numbers),
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
        )
        self._begun: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self._total

    def begin(self) -> Loader:
        """Let the workers start now: what they have ready then need not be waited for."""
        self._begun = iter(self._loader)
        return self

    def __iter__(self) -> Iterator[PackedBatch]:
        begun, self._begun = self._begun or iter(self._loader), None
        for batch in begun:
            if isinstance(batch, SamestepError):
                raise batch
            yield batch


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # the processes are the parallelism
    # A stop is agreed by the ranks, which need their data until then. A rank that dies without a word is noticed
    # (PyTorch's watchdog looks for the parent every 5 s); one that ends calls `_end_workers`.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At the end of the process: multiprocessing would send the SIGTERM that workers ignore, and wait for ever.

    Registered after multiprocessing's own end, so it runs before it.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
