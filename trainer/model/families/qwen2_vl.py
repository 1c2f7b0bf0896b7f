"""Qwen2-VL: every image attends to itself whole, and its features enter the language model once."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from trainer.model.families.modelling import Modelling


def _fuse_tower(visual: Any) -> None:
    from trainer.model import fused  # imports Triton, which is not everywhere

    fused.fuse_patches_and_attention(visual)
    for block in visual.blocks:
        fused.replace_where_it_fits(block, fused.vision_block)
        if type(block.mlp.act).__name__ == "QuickGELUActivation":
            fused.replace_where_it_fits(block.mlp.act, fused.quick_gelu)


FAMILY = Modelling(
    model_type="qwen2_vl",
    decoder_layer=Qwen2VLDecoderLayer,
    fuse_tower=_fuse_tower,
    # A mapping is taken as ready-made masks: the segments say it all, and building masks would sync the device.
    mask={"full_attention": None, "sliding_attention": None},
)
