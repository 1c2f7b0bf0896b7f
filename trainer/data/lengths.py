"""Validates the rows of a split and measures them: token counts from the image header, content digests.

Every distinct image is decoded once, on the CPU, so that a corrupt one is found before a GPU is asked for.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from launch.errors import ConfigError
from launch.index import row_digest
from trainer.data.chartqa import Row, Rows, image_bytes
from trainer.data.encoder import Encoder

MAX_ASPECT_RATIO = 200
"""Qwen2-VL's processor refuses images that are longer than this times their width."""

EXIF_ORIENTATION = 0x0112
Report = Callable[[int, int], None]
"""Told how many rows are done, of how many."""


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
    """A valid row's numbers. `digest`: see `row_digest`."""

    row: int
    digest: bytes
    text_tokens: int
    visual_tokens: int
    target_tokens: int
    human_or_machine: int
    height: int
    width: int


class _RowError(Exception):
    """Why a row is bad."""


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
                if digest and digest not in sizes
            }
            sizes.update(zip(new, pool.map(_decoded_size, new.values()), strict=True))
            for (number, raw), digest in zip(block, digests, strict=True):
                try:
                    measured.append(_measure(number, raw, digest, sizes, encoder))
                except _RowError as refused:
                    bad.append(BadRow(split, number, str(refused)))
            report(min(first + 256, len(rows)), len(rows))
    return measured, bad


def _image_digest(raw: dict[str, Any]) -> bytes | None:
    """sha256 of the image file, None where the row has no usable image value."""
    image = raw.get("image")
    if not isinstance(image, dict):
        return None
    try:
        content = image_bytes(image)
    except (OSError, TypeError, KeyError, ValueError):
        return None
    return hashlib.sha256(content).digest()


def _decoded_size(raw: dict[str, Any]) -> tuple[int, int] | str:
    """(height, width) by the header, after decoding all pixels; or the reason why the image is bad."""
    content = image_bytes(raw["image"])
    if not content:
        return "the image is empty (0 bytes)"
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            image.load()
    except Exception as error:  # Pillow raises a dozen types for damaged files: any of them means a bad image
        return f"the image is corrupt ({type(error).__name__}: {error})"
    return (width, height) if turned else (height, width)


def _measure(
    number: int,
    raw: dict[str, Any],
    digest: bytes | None,
    sizes: dict[bytes, tuple[int, int] | str],
    encoder: Encoder,
) -> Measured:
    if digest is None:
        raise _RowError("the image is missing; each row needs exactly one")
    size = sizes[digest]
    if isinstance(size, str):
        raise _RowError(size)
    height, width = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise _RowError(f"the aspect ratio is above {MAX_ASPECT_RATIO} ({width} x {height} pixels)")
    query, label, human = _texts(raw)
    row = Row(b"", query, label, human)
    text_tokens, target_tokens = _count_text(encoder, row)
    images = encoder.processor.image_processor
    visual = images.get_number_of_image_patches(height, width) // images.merge_size**2
    content = row_digest(image_bytes(raw["image"]), query, label)
    targets = target_tokens if encoder.loss == "answer" else text_tokens + visual - 1
    return Measured(number, content, text_tokens, visual, targets, human, height, width)


def _texts(raw: dict[str, Any]) -> tuple[str, list[str], int]:
    query, label, human = raw.get("query"), raw.get("label"), raw.get("human_or_machine")
    if not isinstance(query, str):
        raise _RowError(f"query is a {type(query).__name__}, not text")
    if not query.strip():
        raise _RowError("query is empty")
    if not isinstance(label, list) or not all(isinstance(text, str) for text in label):
        raise _RowError(f"label is {label!r}, not a list of text")
    if not label or not label[0].strip():
        raise _RowError("label is empty")
    if isinstance(human, bool) or human not in (0, 1):
        raise _RowError(f"human_or_machine is {human!r}, not 0 or 1")
    return query, label, int(human)


def _count_text(encoder: Encoder, row: Row) -> tuple[int, int]:
    """(tokens besides the image's, scored tokens of the answer), by the chat template and the tokenizer."""
    prompt, text = encoder.texts(row)
    tokenizer, image_token = encoder.processor.tokenizer, encoder.processor.image_token_id
    prompt_ids, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    if ids.count(image_token) != 1:
        raise _RowError(
            f"the conversation holds {ids.count(image_token)} image tokens; each row needs exactly one"
        )
    if ids[: len(prompt_ids)] != prompt_ids:
        raise _RowError("the answer merges with the prompt in the tokenizer")
    return len(ids) - 1, len(ids) - len(prompt_ids)


def check_against_processor(rows: Rows, measured: list[Measured], encoder: Encoder, split: str) -> None:
    """Encode 64 rows for real, the extremes among them, and compare their token counts with the measured ones.

    Raises:
        ConfigError: a count differs, so the plan's budgets would be wrong.
    """
    for row in _probes(measured, 64):
        sample = encoder(rows[row.row])
        real = (len(sample.input_ids), sample.target_tokens)
        counted = (row.text_tokens + row.visual_tokens, row.target_tokens)
        if real != counted:
            raise ConfigError(
                f"{split} row {row.row}: the processor makes {real[0]} tokens ({real[1]} scored), the header of its "
                f"{row.width} x {row.height} image gives {counted[0]} ({counted[1]}); the processor is not Qwen2-VL's"
            )


def _probes(measured: list[Measured], count: int) -> Iterator[Measured]:
    """Evenly spaced over the rows sorted by length, so that the shortest and the longest are among them."""
    by_length = sorted(
        measured, key=lambda row: (row.text_tokens + row.visual_tokens, row.height / row.width)
    )
    count = min(count, len(by_length))
    for position in range(count):
        yield by_length[round(position * (len(by_length) - 1) / max(1, count - 1))]
