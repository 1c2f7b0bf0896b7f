"""Qwen2.5-VL: most blocks of the tower attend within windows of an image, `fullatt_block_indexes` to all of it.

The tower takes its patches in the order of the windows and brings its features back at the end (transformers 5.23,
`Qwen2_5_VisionTransformerPretrainedModel.forward`). Positions in the language model are Qwen2-VL's: the seconds
between frames (`second_per_grid_ts`) concern videos alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.vision_utils import get_vision_window_index

from trainer.model.attention import Segments
from trainer.model.families.modelling import Grid, Modelling, send

_WINDOWS = "window_segments"
"""The keyword under which the windows travel to the blocks, beside `segments`: the whole images."""


def _windows(visual: Any, grids: Sequence[Grid], at: torch.device) -> dict[str, Any]:
    """The order of the patches by windows, and where these end; computed on the host."""
    index, bounds = get_vision_window_index(
        torch.tensor(grids), visual.spatial_merge_size, visual.window_size, visual.patch_size
    )
    lengths = tuple(bounds.diff().tolist())
    bounds = send(bounds, at)
    return {
        "window_index": send(index, at),
        "cu_window_seqlens": bounds,
        "max_window_seqlen": max(lengths),
        _WINDOWS: Segments(bounds, lengths),
    }


def _prepare(model: Any) -> None:
    visual = model.model.visual
    for number, block in enumerate(visual.blocks):
        whole = number in visual.fullatt_block_indexes
        block.register_forward_pre_hook(partial(_choose_segments, whole), with_kwargs=True)


def _choose_segments(
    whole: bool, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Let a block's attention have the segments that are its own."""
    windows = kwargs.pop(_WINDOWS, None)
    if windows is not None and not whole:
        kwargs["segments"] = windows
    return args, kwargs


def _fuse_tower(visual: Any) -> None:
    from trainer.model import fused  # imports Triton, which is not everywhere

    fused.fuse_patches_and_attention(visual)
    fused.replace(visual.merger.ln_q, fused.rms_norm)
    for block in visual.blocks:
        fused.replace(block.norm1, fused.rms_norm)
        fused.replace(block.norm2, fused.rms_norm)
        fused.replace(block.mlp, fused.swiglu_mlp)


FAMILY = Modelling(
    model_type="qwen2_5_vl",
    decoder_layer=Qwen2_5_VLDecoderLayer,
    fuse_tower=_fuse_tower,
    mask={"full_attention": None, "sliding_attention": None},  # as for Qwen2-VL
    prepare=_prepare,
    tower_inputs=_windows,
)
