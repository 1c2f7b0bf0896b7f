"""Qwen3-VL: patches of 16 pixels with learned positions, and features of earlier blocks that enter the first decoder
layers (deepstack).

An image's features are one row a visual token: what enters the embeddings, then what each of the first layers adds,
[V, (1 + deepstack) * hidden]. So they are packed, cached and handed on as one tensor. Positions in the language model
are Qwen2-VL's; their interleaving over the channels is in transformers' own rotary embedding. Timestamps between
frames are text, and concern videos alone.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from trainer.model.families.modelling import DEEPSTACK, Grid, Modelling, send


def _positions(visual: Any, grids: Sequence[Grid], at: torch.device) -> dict[str, Any]:
    """Which learned positions each patch lies between, and how near; computed on the host."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids),
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=visual.spatial_merge_size,
    )
    return {"interp_indices": send(indices, at), "interp_weights": send(weights, at)}


def _features(output: Any) -> Tensor:
    return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)


def _prepare(model: Any) -> None:
    language = model.model.language_model
    language.register_forward_pre_hook(_hand_over, with_kwargs=True)
    stock = language._deepstack_process

    def add(_: nn.Module, hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
        if places.dtype == torch.bool:
            return stock(hidden, places, features)
        return hidden.index_add(1, places, features[None].to(hidden.dtype))

    language._deepstack_process = types.MethodType(add, language)


def _hand_over(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """The packed forward's features under transformers' names; positions instead of a mask, which would sync."""
    deepstack = kwargs.pop(DEEPSTACK, None)
    if deepstack is not None:
        kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = deepstack
    return args, kwargs


def _fuse_tower(visual: Any) -> None:
    from trainer.model import fused  # imports Triton, which is not everywhere

    fused.fuse_patches_and_attention(visual)


FAMILY = Modelling(
    model_type="qwen3_vl",
    decoder_layer=Qwen3VLTextDecoderLayer,
    fuse_tower=_fuse_tower,
    mask=None,  # transformers builds none for an attention that it does not know (`create_causal_mask`, 5.23)
    prepare=_prepare,
    tower_inputs=_positions,
    features=_features,
    maps=lambda tower: 1 + len(tower.config.deepstack_visual_indexes),
    stock="norms of queries and keys, and the tower's norms and MLP",
)
