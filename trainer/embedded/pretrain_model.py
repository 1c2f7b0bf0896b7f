"""A Qwen2-VL called so that many charts of one size go through it together: how the tiny base learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


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


class BatchedModel:
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
