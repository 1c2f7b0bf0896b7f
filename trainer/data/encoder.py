"""One row -> one encoded sample, text and image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from launch.errors import RunError
from trainer.data.chartqa import Row, chat
from trainer.data.images import decode_image
from trainer.data.row_errors import RowError, reason_of
from trainer.vision_cache.store import FeatureCache, name_of

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
    image: str = ""  # its name, the same for the same bytes

    @property
    def target_tokens(self) -> int:
        """Scored tokens: labels that some earlier token predicts."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Encoder:
    """Turns rows into samples with the base model's processor.

    `features`: an image that is there is neither decoded nor processed; `pixels`: dtype of the others' patches, the
    tower's own, to which it would round them anyway.
    """

    processor: ProcessorMixin
    system_message: str
    loss: str
    features: FeatureCache | None = None
    pixels: torch.dtype = torch.float32

    def __call__(self, row: Row) -> Sample:
        """Encode one row.

        Raises:
            RowError: its image cannot be decoded, the processor refuses it, or the answer's first token merges with
                the prompt's last, so that no mask could part them.
        """
        prompt, text = self.texts(row)
        image = name_of(row.image)
        cached = self.features.read(image) if self.features else None
        if cached is not None:
            input_ids, grid, pixels = self._ids(text, len(cached.values)), cached.grid, None
        else:
            encoded = self._processed(text, decode_image(row.image))
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

    def _processed(self, text: str, image: Image.Image) -> Any:
        try:
            return self.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # of text or image, and of no type that the processor promises
            raise RowError(f"the processor refuses it ({reason_of(error)})") from error

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Finds the tokenizer's special tokens in a text: the model would read them as structure, not as words."""
        tokenizer = self.processor.tokenizer
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokens = {*tokenizer.all_special_tokens, *added} - {""}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

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

    def scored_text(self, row: Row) -> str | None:
        """The answer and the end of its turn, as the chat template writes them; None for all but the first token."""
        prompt, text = self.texts(row)
        return text[len(prompt) :] if self.loss == "answer" else None

    def prompt_length(self, prompt: str, input_ids: Tensor) -> int:
        """Tokens before the answer, visual ones included."""
        prompt_ids = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        visual = int((input_ids == self.processor.image_token_id).sum())
        length = len(prompt_ids) - 1 + visual
        if prompt_ids[-2:] != input_ids[length - 2 : length].tolist():
            raise RowError(f"the answer merges with the prompt {prompt[-20:]!r} in the tokenizer")
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
