"""The micro-batches of a step plan and of an evaluation, by number: read, encoded, packed, held against the index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch.utils.data import Dataset

from launch.errors import RunError, SamestepError
from launch.inputs.dataset_index import Split
from launch.planning.step_plan import MicroBatch, StepPlan
from trainer.data.encoder import IGNORED, Encoder
from trainer.data.packing import ModelInputs, pack
from trainer.data.row_errors import RowError, naming_row
from trainer.data.rows import Row
from trainer.data.splits import Rows
from trainer.task import LeftOut


class PackedBatch(TypedDict):
    """One micro-batch of one rank, and what the step knows about it."""

    inputs: ModelInputs
    step: int  # counted from 0
    step_target_tokens: int  # of the whole optimizer step, over all ranks
    samples: tuple[int, ...]  # positions in the split; empty for a filler
    images: int


class Batches(Dataset["PackedBatch | SamestepError"]):
    """Micro-batches by number. An error is handed over as a value: raised in a data worker, it would come out
    with the worker's traceback for a message (`torch._utils.ExceptionWrapper`, 2.14)."""

    def __getitem__(self, number: int) -> PackedBatch | SamestepError:
        try:
            return self.batch(number)
        except SamestepError as error:
            return error

    def batch(self, number: int) -> PackedBatch:
        """Return micro-batch `number`."""
        raise AssertionError("every kind of micro-batches makes its own")

    def sample_bytes(self) -> int:
        """The bytes of one sample, on the average."""
        raise AssertionError("every kind of micro-batches knows its own")


class MicroBatches(Batches):
    """This rank's micro-batches of a step plan by number: number i is micro-batch i % M of step i // M."""

    def __init__(
        self,
        rows: Rows,
        split: Split,
        encoder: Encoder,
        plan: StepPlan,
        rank: int,
        left_out: LeftOut = LeftOut(),  # noqa: B008 - frozen
    ) -> None:
        self._rows, self._split, self._encoder, self._plan, self._rank = rows, split, encoder, plan, rank
        self._left_out = left_out
        self._step: tuple[int, Sequence[MicroBatch]] = (-1, [])

    def __len__(self) -> int:
        return self._plan.max_steps * self._plan.micro_batches

    def batch(self, number: int) -> PackedBatch:
        """Return the micro-batch, packed."""
        step, position = divmod(number, self._plan.micro_batches)
        if self._step[0] != step:
            self._step = (step, self._plan.micro_batches_of(step, self._rank))
        target_tokens = int(self._split.target_tokens[self._plan.samples(step)].sum())
        unscored = self._left_out.at(step)
        micro_batch = self._step[1][position]
        return assemble(self._rows, self._split, self._encoder, micro_batch, step, target_tokens, unscored)

    def sample_bytes(self) -> int:
        """The bytes of one sample, on the average."""
        return _sample_bytes(self._split, self._encoder)


class EvaluationBatches(Batches):
    """This rank's micro-batches of an evaluation."""

    def __init__(self, rows: Rows, split: Split, encoder: Encoder, batches: Sequence[MicroBatch]) -> None:
        self._rows, self._split, self._encoder, self._batches = rows, split, encoder, batches

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, number: int) -> PackedBatch:
        """Return the micro-batch, packed; it belongs to no step."""
        return assemble(self._rows, self._split, self._encoder, self._batches[number], -1, 1)

    def sample_bytes(self) -> int:
        """The bytes of one sample, on the average."""
        return _sample_bytes(self._split, self._encoder)


def _sample_bytes(split: Split, encoder: Encoder) -> int:
    """Pixels, as if no features were cached, and about eight numbers a token."""
    images = encoder.processor.image_processor
    of_token = images.merge_size**2 * 3 * images.temporal_patch_size * images.patch_size**2
    pixels = of_token * encoder.pixels.itemsize
    return int(split.visual_tokens.mean() * pixels + split.tokens.mean() * 64)


def assemble(
    rows: Rows,
    split: Split,
    encoder: Encoder,
    batch: MicroBatch,
    step: int,
    step_target_tokens: int,
    unscored: Collection[int] = (),
) -> PackedBatch:
    """Read, decode, encode and pack the samples of a micro-batch, checked against the index.

    `unscored`: samples whose targets weigh nothing; they are computed like the others.

    Raises:
        RunError: a row is not the one the index was made of, or its token counts are others, so that the loss
            would be normalized wrongly; or it can be read and not encoded.
    """
    read = [_read(rows, split, sample) for sample in batch.samples]
    for number, row in zip(batch.samples, read, strict=True):
        if row.digest != split.digests[number]:
            raise RunError(
                f"data: sample {number} (row {split.rows[number]}) is not what `samestep prepare` saw; "
                "the data changed since: prepare it again, under another run name"
            )
    samples = []
    for number, row in zip(batch.samples, read, strict=True):
        with naming_row(f"data: sample {number} (row {split.rows[number]})"):
            samples.append(encoder(row))
    prefixes = split.prefixes(batch.samples)
    for number, sample, prefix in zip(batch.samples, samples, prefixes, strict=True):
        counts = (len(sample.input_ids), sample.target_tokens)
        indexed = (int(split.tokens[number]), int(split.target_tokens[number]))
        if counts != indexed:
            raise RunError(
                f"data: sample {number} (row {split.rows[number]}) has {counts[0]} tokens of which {counts[1]} are "
                f"targets, the index says {indexed[0]} and {indexed[1]}; the libraries changed since `samestep prepare`"
            )
        if sample.input_ids[:prefix].tolist() != encoder.shared_prefix[:prefix]:
            raise RunError(
                f"data: sample {number} (row {split.rows[number]}) begins with other tokens than the system message's, "
                "which the index says it begins with; the libraries changed since `samestep prepare`"
            )
    processor = encoder.processor
    samples = [
        replace(sample, labels=torch.full_like(sample.labels, IGNORED)) if number in unscored else sample
        for number, sample in zip(batch.samples, samples, strict=True)
    ]
    return PackedBatch(
        inputs=pack(
            samples,
            sample_ids=batch.samples,
            step=step,
            masked=batch.filler,
            image_token_id=processor.image_token_id,
            merge=processor.image_processor.merge_size,
            prefixes=prefixes,
        ),
        step=step,
        step_target_tokens=step_target_tokens,
        samples=() if batch.filler else tuple(batch.samples),
        images=sum(len(sample.images) for sample in samples),
    )


def _read(rows: Rows, split: Split, sample: int) -> Row:
    try:
        return rows[int(split.rows[sample])]
    except (RowError, OSError, LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"data: sample {sample} (row {split.rows[sample]}) cannot be read ({type(error).__name__}: {error}); "
            "the data changed or went away since `samestep prepare`"
        ) from error
