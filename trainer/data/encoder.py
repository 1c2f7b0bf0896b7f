"""One row -> one encoded sample: the text of its turns, and its images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from launch.errors import RunError
from trainer.data.images import decode_image
from trainer.data.row_errors import RowError, describe_error
from trainer.data.rows import Row, Turn, chat
from trainer.vision_cache.store import FeatureCache, image_name

IGNORED = -100
"""The label of a token that the loss does not count (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class EncodedImage:
    """One image of P patches and V = P / merge_size**2 visual tokens: its pixels, or its features where cached.

    `grid`: patches in time, height and width; `name`: the same for the same bytes.
    """

    grid: tuple[int, int, int]
    pixel_values: Tensor | None  # [P, channels * temporal_patch * patch * patch]
    features: Tensor | None = None  # [V, hidden]
    name: str = ""

    def visual_tokens(self, merge: int) -> int:
        """Count the tokens that stand for it, with `merge` patches a side folded into one."""
        time, height, width = self.grid
        return time * height * width // merge**2


@dataclass(frozen=True)
class Sample:
    """One encoded sample of T tokens and its images, none to several."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORED where the loss does not count
    positions: Tensor  # [3, T] int64, M-RoPE
    images: tuple[EncodedImage, ...]

    @property
    def target_tokens(self) -> int:
        """Count the scored tokens: labels that some earlier token predicts."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Conversation:
    """A row as text through the chat template. `answers`: where each answer that is scored begins and ends in it, the
    end of its turn included; the last one ends with the text."""

    text: str
    answers: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> str:
        """The text up to where the last answer begins."""
        return self.text[: self.answers[-1][0]]


@dataclass(frozen=True)
class Encoder:
    """Turns rows into samples with the base model's processor.

    `loss`: as of `data.loss`. `features`: an image that is there is neither decoded nor processed; `pixels`: dtype of
    the others' patches, the tower's own, to which it would round them anyway.
    """

    processor: ProcessorMixin
    system_message: str | None
    loss: str
    features: FeatureCache | None = None
    pixels: torch.dtype = torch.float32

    def __call__(self, row: Row) -> Sample:
        """Encode one row.

        Raises:
            RowError: an image cannot be decoded, the processor refuses it, or a token lies across the border of an
                answer, so that no mask could part them.
        """
        conversation = self.conversation(row)
        input_ids, images = self._encoded(conversation.text, row.images)
        is_image = input_ids == self.processor.image_token_id
        merge: int = self.processor.image_processor.merge_size
        return Sample(
            input_ids=input_ids,
            labels=self._labels(conversation, input_ids, [image.visual_tokens(merge) for image in images]),
            positions=mrope_positions(is_image, [image.grid for image in images], merge),
            images=images,
        )

    def _encoded(self, text: str, images: Sequence[bytes]) -> tuple[Tensor, tuple[EncodedImage, ...]]:
        """Token ids [T], and the images with their pixels or cached features."""
        names = [image_name(image) for image in images]
        cached = [self.features.read(name) if self.features else None for name in names]
        fresh = [decode_image(image) for image, known in zip(images, cached, strict=True) if known is None]
        input_ids = None
        pixels: list[tuple[Tensor, tuple[int, int, int]]] = []
        if fresh:
            processed = self._processed(text, fresh, whole=len(fresh) == len(images))
            input_ids = processed["input_ids"][0] if "input_ids" in processed else None
            grids = [(int(t), int(h), int(w)) for t, h, w in processed["image_grid_thw"].tolist()]
            values = processed["pixel_values"].to(self.pixels).split([t * h * w for t, h, w in grids])
            pixels = list(zip(values, grids, strict=True))
        processed_images = iter(pixels)
        encoded = []
        for name, known in zip(names, cached, strict=True):
            if known is not None:
                encoded.append(EncodedImage(known.grid, None, known.values, name))
            else:
                values_of_image, grid = next(processed_images)
                encoded.append(EncodedImage(grid, values_of_image, None, name))
        if input_ids is None:
            merge = self.processor.image_processor.merge_size
            input_ids = torch.tensor(self._ids(text, [image.visual_tokens(merge) for image in encoded]))
        return input_ids, tuple(encoded)

    def _processed(self, text: str, images: list[Image.Image], *, whole: bool) -> Any:
        """Pixels and grids of images; with `whole`, when these are all of the text's, its token ids too."""
        try:
            if whole:
                return self.processor(
                    text=[text], images=images, return_tensors="pt", add_special_tokens=False
                )
            return self.processor.image_processor(images=images, return_tensors="pt")
        except Exception as error:  # of text or image, and of no type that the processor promises
            raise RowError(f"the processor refuses it ({describe_error(error)})") from error

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """A pattern that finds the tokenizer's special tokens in a text: the model would read them as structure, not as
        words.
        """
        tokenizer = self.processor.tokenizer
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokens = {*tokenizer.all_special_tokens, *added} - {""}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    @cached_property
    def shared_prefix(self) -> list[int]:
        """The token ids that every prompt begins with which has no system message of its own: that of the recipe, and
        what the chat template writes around it. None where every token is a target.
        """
        if self.loss == "sequence":
            return []
        try:
            prompts = [self._rendered([Turn("user", (words,))], prompt=True) for words in ("A", "7")]
        except Exception:  # a template of somebody else's, which may ask for an image
            return []
        one, other = (self.text_ids(prompt) for prompt in prompts)
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        prefix = [token for token, _ in alike]
        return [] if self.processor.image_token_id in prefix else prefix

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text in which one token stands for each image."""
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _ids(self, text: str, visual_tokens: Sequence[int]) -> list[int]:
        """Token ids of a conversation and its images, as the processor makes them of text and pixels."""
        return _spread(self.text_ids(text), self.processor.image_token_id, visual_tokens)

    def conversation(self, row: Row) -> Conversation:
        """Return the row through the chat template.

        Raises:
            RunError: the template does not write a conversation turn by turn, so that no answer could be told apart.
        """
        text = self._rendered(row.turns)
        answers = [place for place, turn in enumerate(row.turns) if turn.role == "assistant"]
        spans = []
        for place in answers if self.loss == "all_answers" else answers[-1:]:
            prompt = self._rendered(row.turns[:place], prompt=True)
            is_last = place == len(row.turns) - 1
            ended = text if is_last else self._rendered(row.turns[: place + 1])
            if not (text.startswith(ended) and ended.startswith(prompt)):
                raise RunError(
                    "model: its chat template does not begin a conversation with the prompt it generates from"
                )
            spans.append((len(prompt), len(ended)))
        return Conversation(text, tuple(spans))

    def _rendered(self, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        text: str = self.processor.apply_chat_template(
            chat(self.system_message, turns), tokenize=False, add_generation_prompt=prompt
        )
        return text

    def texts(self, row: Row) -> tuple[str, str]:
        """Return the prompt up to where the last answer begins, and the whole conversation, by the chat template."""
        conversation = self.conversation(row)
        return conversation.prompt, conversation.text

    def scored_texts(self, row: Row) -> tuple[str, ...] | None:
        """Return each scored answer with the end of its turn, as the template writes them; None: all but the first
        token.
        """
        if self.loss == "sequence":
            return None
        conversation = self.conversation(row)
        return tuple(conversation.text[begin:end] for begin, end in conversation.answers)

    def spans(self, conversation: Conversation, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return where the scored answers begin and end in `ids`, the `text_ids` of the conversation.

        Raises:
            RowError: a token lies across a border.
        """
        text = conversation.text

        def tokens_before(place: int, what: str) -> int:
            if place == len(text):
                return len(ids)
            before = self.text_ids(text[:place])
            if ids[: len(before)] != before:
                raise RowError(f"the answer merges with the {what} in the tokenizer")
            return len(before)

        return [
            (tokens_before(begin, "prompt"), tokens_before(end, "next turn"))
            for begin, end in conversation.answers
        ]

    def _labels(self, conversation: Conversation, input_ids: Tensor, visual_tokens: Sequence[int]) -> Tensor:
        """Labels [T]: the scored tokens' ids, IGNORED elsewhere. RowError as `spans`."""
        if self.loss == "sequence":
            return input_ids.clone()
        labels = torch.full_like(input_ids, IGNORED)
        ids = self.text_ids(conversation.text)
        before = [0]  # tokens that images add before each text token
        images = iter(visual_tokens)
        for token in ids:
            before.append(before[-1] + (next(images, 1) - 1 if token == self.processor.image_token_id else 0))
        for begin, end in self.spans(conversation, ids):
            begin, end = begin + before[begin], end + before[end]
            labels[begin:end] = input_ids[begin:end]
        return labels


def _spread(ids: Sequence[int], image_token: int, visual_tokens: Sequence[int]) -> list[int]:
    """Token ids with the token of each image repeated for its visual tokens."""
    counts = iter(visual_tokens)
    return [each for token in ids for each in [token] * (next(counts) if token == image_token else 1)]


def mrope_positions(is_image: Tensor, grids: Sequence[tuple[int, int, int]], merge: int) -> Tensor:
    """Return the M-RoPE positions [3, T] of a sample with the images `grids` (patches in time, height and width), none
    to several.

    Text counts on all three axes together; a visual token has the text position where its image begins plus its own
    (time, height, width); the text after it goes on from the largest position so far.
    Source: Qwen2-VL (arXiv 2409.12191, section 2.1); tested against `Qwen2VLModel.get_rope_index`.
    """
    places = is_image.nonzero()[:, 0].tolist()
    parts, done, position, seen = [], 0, 0, 0  # `done`: tokens; `position`: the next text's
    for grid in grids:
        time, height, width = grid[0], grid[1] // merge, grid[2] // merge
        begin = places[seen]
        parts.append(torch.arange(begin - done).expand(3, -1) + position)
        position += begin - done
        axes = torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(torch.stack(axes).reshape(3, -1) + position)
        position += max(time, height, width)
        seen += time * height * width
        done = begin + time * height * width
    parts.append(torch.arange(len(is_image) - done).expand(3, -1) + position)
    return torch.cat(parts, dim=1)
