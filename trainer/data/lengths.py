"""Validates the rows of a split and measures them: token counts from the image's size, content digests.

Every distinct image is decoded once, on the CPU and as training decodes it, so that whatever training would meet is
found before a GPU is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError, SamestepError
from launch.inputs.dataset_index import row_digest
from launch.untrusted_files import printable
from trainer.data.chartqa import Row, Rows, image_bytes
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.relaxed_accuracy import correct
from trainer.data.row_errors import RowError, reason_of
from trainer.progress_bars import Report

MAX_ASPECT_RATIO = 200
"""The image processor of all families refuses an image that is longer than this times its width."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, and why."""

    split: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.split} row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Measured:
    """A valid row's numbers. `digest`: see `row_digest`; `answers`: labels; `answer_tokens`: see `needed_tokens`."""

    row: int
    digest: bytes
    text_tokens: int
    visual_tokens: int
    target_tokens: int
    human_or_machine: int
    height: int
    width: int
    answers: int
    answer_tokens: int


def measure_split(
    rows: Rows, split: str, encoder: Encoder, report: Report
) -> tuple[list[Measured], list[BadRow]]:
    """Measure every row; `report` is told the progress. The images are decoded on all cores this process may use."""
    sizes: dict[bytes, tuple[int, int] | str] = {}
    measured: list[Measured] = []
    bad: list[BadRow] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for first in range(0, len(rows), 256):
            block = [(number, rows.raw(number)) for number in range(first, min(first + 256, len(rows)))]
            digests = [_image_digest(raw) for _, raw in block]
            new = {
                digest: raw
                for digest, (_, raw) in zip(digests, block, strict=True)
                if isinstance(digest, bytes) and digest not in sizes
            }
            sizes.update(zip(new, pool.map(_decoded_size, new.values()), strict=True))
            for (number, raw), digest in zip(block, digests, strict=True):
                try:
                    measured.append(_measure(number, raw, digest, sizes, encoder))
                except RowError as refused:
                    bad.append(BadRow(split, number, str(refused)))
            report(min(first + 256, len(rows)), len(rows))
    return measured, bad


def _image_content(raw: dict[str, Any]) -> bytes:
    """The bytes of the row's image file; RowError: there are none."""
    image = raw.get("image")
    if not isinstance(image, dict) or (image.get("bytes") is None and not image.get("path")):
        raise RowError("the image is missing; each row needs exactly one")
    try:
        return image_bytes(image)
    except Exception as error:  # as with decoding: none of them may end `prepare`
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise RowError(
            f"the image file {printable(str(Path(str(image.get('path'))).absolute()))} cannot be read ({why}); give "
            "the bytes, or the path of a file that every machine can read"
        ) from error


def _image_digest(raw: dict[str, Any]) -> bytes | str:
    """sha256 of the image file, or why there is none."""
    try:
        return hashlib.sha256(_image_content(raw)).digest()
    except RowError as refused:
        return str(refused)


def _decoded_size(raw: dict[str, Any]) -> tuple[int, int] | str:
    """(height, width) of the decoded image, or why the image is bad."""
    try:
        width, height = decode_image(_image_content(raw)).size
    except RowError as refused:
        return str(refused)
    return height, width


def _measure(
    number: int,
    raw: dict[str, Any],
    digest: bytes | str,
    sizes: dict[bytes, tuple[int, int] | str],
    encoder: Encoder,
) -> Measured:
    if isinstance(digest, str):
        raise RowError(digest)
    size = sizes[digest]
    if isinstance(size, str):
        raise RowError(size)
    query, label, human = _texts(raw, encoder)
    text_tokens, target_tokens = _count_text(encoder, Row(b"", query, label, human))
    visual = _visual_tokens(encoder, *size)
    return Measured(
        row=number,
        digest=row_digest(_image_content(raw), query, label),
        text_tokens=text_tokens,
        visual_tokens=visual,
        target_tokens=target_tokens if encoder.loss == "answer" else text_tokens + visual - 1,
        human_or_machine=human,
        height=size[0],
        width=size[1],
        answers=len(label),
        answer_tokens=needed_tokens(label[0], encoder.processor.tokenizer),
    )


def _visual_tokens(encoder: Encoder, height: int, width: int) -> int:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise RowError(f"the aspect ratio is above {MAX_ASPECT_RATIO} ({width} x {height} pixels)")
    images = encoder.processor.image_processor
    try:
        patches: int = images.get_number_of_image_patches(height, width)
    except Exception as error:
        raise RowError(
            f"the processor refuses an image of {width} x {height} pixels ({reason_of(error)})"
        ) from error
    return patches // images.merge_size**2


def _texts(raw: dict[str, Any], encoder: Encoder) -> tuple[str, list[str], int]:
    query, label, human = raw.get("query"), raw.get("label"), raw.get("human_or_machine")
    if not isinstance(query, str):
        raise RowError(f"query is a {type(query).__name__}, not text")
    if not query.strip():
        raise RowError("query is empty")
    if not isinstance(label, list) or not all(isinstance(text, str) for text in label):
        raise RowError(f"label is {repr(label)[:100]}, not a list of text")
    if not label or not label[0].strip():
        raise RowError("label is empty")
    if isinstance(human, bool) or human not in (0, 1):
        raise RowError(f"human_or_machine is {repr(human)[:100]}, not 0 or 1")
    for name, text in (("query", query), ("label", label[0])):
        if found := encoder.control_tokens.search(text):
            raise RowError(
                f"{name} holds the special token {found[0]}, which the model does not read as text"
            )
    return query, label, int(human)


def _count_text(encoder: Encoder, row: Row) -> tuple[int, int]:
    """(tokens besides the image's, scored tokens of the answer), by the chat template and the tokenizer."""
    tokenizer, image_token = encoder.processor.tokenizer, encoder.processor.image_token_id
    try:
        prompt, text = encoder.texts(row)
        prompt_ids, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    except SamestepError:
        raise
    except Exception as error:
        raise RowError(f"the chat template or the tokenizer refuses it ({reason_of(error)})") from error
    if ids.count(image_token) != 1:
        raise RowError(
            f"the conversation holds {ids.count(image_token)} image tokens; each row needs exactly one"
        )
    if ids[: len(prompt_ids)] != prompt_ids:
        raise RowError("the answer merges with the prompt in the tokenizer")
    return len(ids) - 1, len(ids) - len(prompt_ids)


def needed_tokens(label: str, tokenizer: Any) -> int:
    """The fewest first tokens of `label` that answer it under relaxed accuracy; 0 when not even all of them do.

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
            bad.append(BadRow(split, row.row, str(refused)))
            continue
        real = (len(sample.input_ids), sample.target_tokens)
        counted = (row.text_tokens + row.visual_tokens, row.target_tokens)
        if real != counted:
            raise ConfigError(
                f"{split} row {row.row}: the processor makes {real[0]} tokens ({real[1]} scored), the size of its "
                f"{row.width} x {row.height} image gives {counted[0]} ({counted[1]}); the processor is not its family's"
            )
    return bad


def _probes(measured: list[Measured], count: int) -> Iterator[Measured]:
    """Evenly spaced over the rows sorted by length, so that the shortest and the longest are among them."""
    by_length = sorted(
        measured, key=lambda row: (row.text_tokens + row.visual_tokens, row.height / row.width)
    )
    count = min(count, len(by_length))
    for position in range(count):
        yield by_length[round(position * (len(by_length) - 1) / max(1, count - 1))]
