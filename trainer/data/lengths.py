"""Validates the rows of a split and measures them: token counts from the image's size, content digests.

Every distinct image is decoded once, on the CPU and as training decodes it, so that whatever training would meet is
found before a GPU is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from launch.errors import ConfigError, SamestepError
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image, refuse_stripe
from trainer.data.relaxed_accuracy import correct
from trainer.data.row_errors import RowError, describe_error
from trainer.data.rows import Row
from trainer.data.splits import Rows
from trainer.progress_bars import ReportProgress

MAX_CHARACTERS = 1_000_000
"""Of one text: some 200,000 tokens; no tokenizer is given more to chew."""
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, and why. `file`, `line`: where it begins; empty and 0: rows have no lines."""

    split: str
    row: int
    reason: str
    file: str = ""
    line: int = 0


def bad_row(rows: Rows, split: str, number: int, refused: RowError) -> BadRow:
    """Return what is said of a row that was refused."""
    return BadRow(split, number, str(refused), *(rows.place(number) or ()))


@dataclass(frozen=True)
class Measured:
    """A valid row's numbers. `row`: its number in the source; `digest`: of its content; `image_tokens`: the visual
    tokens of each image; `sizes`: the images' (height, width); `human_or_machine`: None where it is not known;
    `answers`: labels; `answer_tokens`: see `needed_tokens`; `label_tokens`: of the whole first label; `prefix_tokens`:
    of `Encoder.shared_prefix`, with which it begins, else 0."""

    row: int
    digest: bytes
    text_tokens: int
    image_tokens: tuple[int, ...]
    target_tokens: int
    human_or_machine: int | None
    sizes: tuple[tuple[int, int], ...]
    answers: int
    answer_tokens: int
    label_tokens: int
    prefix_tokens: int

    @property
    def visual_tokens(self) -> int:
        """Count the visual tokens of all its images."""
        return sum(self.image_tokens)


_Size = tuple[int, int] | str
"""(height, width) of a decoded image, or why it is bad."""


def measure_split(
    rows: Rows, split: str, encoder: Encoder, report: ReportProgress
) -> tuple[list[Measured], list[BadRow]]:
    """Measure every row; `report` is told the progress. The images are decoded on all cores this process may use."""
    sizes: dict[bytes, _Size] = {}
    measured: list[Measured] = []
    bad: list[BadRow] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for first in range(0, len(rows), 256):
            numbers = rows.numbers[first : first + 256].tolist()
            block = [(number, _read(rows, number)) for number in numbers]
            images = {
                hashlib.sha256(image).digest(): image
                for _, row in block
                if isinstance(row, Row)
                for image in row.images
            }
            new = {digest: image for digest, image in images.items() if digest not in sizes}
            sizes.update(zip(new, pool.map(_decoded_size, new.values()), strict=True))
            for number, row in block:
                try:
                    measured.append(_measure(number, row, sizes, encoder, rows.kind.texts))
                except RowError as refused:
                    bad.append(bad_row(rows, split, number, refused))
            report(min(first + 256, len(rows)), len(rows))
    return measured, bad


def _read(rows: Rows, number: int) -> Row | RowError:
    try:
        return rows[number]
    except RowError as refused:
        return refused


def _decoded_size(image: bytes) -> _Size:
    try:
        width, height = decode_image(image).size
    except RowError as refused:
        return str(refused)
    return height, width


def _measure(
    number: int,
    row: Row | RowError,
    sizes: dict[bytes, _Size],
    encoder: Encoder,
    texts: tuple[str, str] | None,
) -> Measured:
    if isinstance(row, RowError):
        raise row
    of_images = [sizes[hashlib.sha256(image).digest()] for image in row.images]
    for place, size in enumerate(of_images):
        if isinstance(size, str):
            raise RowError(size if len(of_images) == 1 else f"image {place}: {size}")
    known = [size for size in of_images if not isinstance(size, str)]
    _check_texts(row, encoder, texts)
    text_tokens, scored, prefix_tokens = _count_text(encoder, row)
    tokenizer = encoder.processor.tokenizer
    visual = tuple(_visual_tokens(encoder, *size) for size in known)
    return Measured(
        row=number,
        digest=row.digest,
        text_tokens=text_tokens,
        image_tokens=visual,
        target_tokens=text_tokens + sum(visual) - 1 if encoder.loss == "sequence" else scored,
        human_or_machine=row.human_or_machine,
        sizes=tuple(known),
        answers=len(row.label),
        answer_tokens=needed_tokens(row.label[0], tokenizer),
        label_tokens=len(tokenizer(row.label[0], add_special_tokens=False)["input_ids"]),
        prefix_tokens=prefix_tokens,
    )


def _visual_tokens(encoder: Encoder, height: int, width: int) -> int:
    refuse_stripe(height, width)
    images = encoder.processor.image_processor
    try:
        patches: int = images.get_number_of_image_patches(height, width)
    except Exception as error:
        raise RowError(
            f"the processor refuses an image of {width} x {height} pixels ({describe_error(error)})"
        ) from error
    return patches // images.merge_size**2


def _check_texts(row: Row, encoder: Encoder, texts: tuple[str, str] | None) -> None:
    """`texts`: what the table calls question and answer; None: they are messages."""
    for place, turn in enumerate(row.turns):
        name = (texts or row.turn_names)[place]
        _check_characters(name, turn.text)
        if special := encoder.control_tokens.search(turn.text):
            raise RowError(
                f"{name} holds the special token {special[0]}, which the model does not read as text"
            )
    for number, label in enumerate(row.label[1:], 2):
        _check_characters(f"answer {number} of {texts[1] if texts else 'the row'}", label)


def _check_characters(name: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise RowError(f"{name} has {len(text):,} characters, more than any model reads; cut it")
    if half := _HALF_CHARACTER.search(text):
        raise RowError(f"{name} holds half a character ({half[0]!a} at {half.start():,}); write it whole")


def _count_text(encoder: Encoder, row: Row) -> tuple[int, int, int]:
    """(tokens besides the images', scored tokens of the answers, tokens of the shared prefix), by the chat template and
    the tokenizer.
    """
    image_token = encoder.processor.image_token_id
    try:
        conversation = encoder.conversation(row)
        ids = encoder.text_ids(conversation.text)
        spans = encoder.spans(conversation, ids)
    except (SamestepError, RowError):
        raise
    except Exception as error:
        raise RowError(f"the chat template or the tokenizer refuses it ({describe_error(error)})") from error
    if ids.count(image_token) != len(row.images):
        raise RowError(
            f"the conversation holds {ids.count(image_token)} image tokens, the row has {len(row.images)} images"
        )
    prefix = encoder.shared_prefix
    # Its last token must not predict a target: samples go apart after it.
    begins_with_it = ids[: len(prefix)] == prefix and min(begin for begin, _ in spans) > len(prefix)
    scored = sum(end - begin for begin, end in spans)
    return len(ids) - len(row.images), scored, len(prefix) if begins_with_it else 0


def needed_tokens(label: str, tokenizer: Any) -> int:
    """Count the fewest first tokens of `label` that answer it under relaxed accuracy; 0 when not even all of them do.

    What a perfect model says is the label's tokens, cut at `evaluation.max_new_tokens`.
    """
    ids = tokenizer(label, add_special_tokens=False)["input_ids"]

    def answered_by(count: int) -> bool:
        return correct(tokenizer.decode(ids[:count], skip_special_tokens=True), label)

    count = len(ids)
    if not answered_by(count):
        return 0
    while count > 1 and answered_by(count - 1):
        count -= 1
    return count


def check_against_processor(
    rows: Rows, measured: list[Measured], encoder: Encoder, split: str
) -> list[BadRow]:
    """Encode 64 rows for real, the extremes among them, and compare their token counts with the measured ones.

    Returns the rows among them that cannot be encoded.

    Raises:
        ConfigError: a count differs, so the plan's budgets would be wrong.
    """
    bad = []
    for row in _probes(measured, 64):
        try:
            sample = encoder(rows[row.row])
        except RowError as refused:
            bad.append(bad_row(rows, split, row.row, refused))
            continue
        real = (len(sample.input_ids), sample.target_tokens)
        counted = (row.text_tokens + row.visual_tokens, row.target_tokens)
        if real != counted:
            sizes = ", ".join(f"{width} x {height}" for height, width in row.sizes) or "no"
            raise ConfigError(
                f"{split} row {row.row}: the processor makes {real[0]} tokens ({real[1]} scored), the size of its "
                f"{sizes} image gives {counted[0]} ({counted[1]}); the processor is not its family's"
            )
    return bad


def _probes(measured: list[Measured], count: int) -> Iterator[Measured]:
    """Evenly spaced over the rows sorted by length, so that the shortest and the longest are among them."""
    by_length = sorted(
        measured,
        key=lambda row: (
            row.text_tokens + row.visual_tokens,
            row.sizes[0][0] / row.sizes[0][1] if row.sizes else 0.0,
        ),
    )
    count = min(count, len(by_length))
    for position in range(count):
        yield by_length[round(position * (len(by_length) - 1) / max(1, count - 1))]
