"""What the hub's config.json says of the published models of each family, and how many parameters it counts."""

from __future__ import annotations

from typing import Any

from tests.helpers.indexes import HUB_7B


def qwen2_5(
    hidden: int, inner: int, layers: int, heads: int, kv: int, tower: int, words: int
) -> dict[str, Any]:
    """Flat, as on the hub."""
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": tower, "in_chans": 3, "patch_size": 14}
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": words,
        "tie_word_embeddings": hidden == 2048,
        "vision_config": vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
    }


def qwen3(hidden: int, inner: int, layers: int, heads: int, tower: tuple[int, int, int]) -> dict[str, Any]:
    width, tower_inner, blocks = tower
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": False,
        "vocab_size": 151936,
    }
    vision = {
        "depth": blocks,
        "hidden_size": width,
        "intermediate_size": tower_inner,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    tied = hidden < 4096
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": vision,
    }


SMALL_TOWER, LARGE_TOWER = (1024, 4096, 24), (1152, 4304, 27)
PUBLISHED = {
    "Qwen2-VL-7B": (HUB_7B, 8_291_375_616),
    "Qwen2.5-VL-3B": (qwen2_5(2048, 11008, 36, 16, 2, 3420, 151936), 3_754_622_976),
    "Qwen2.5-VL-7B": (qwen2_5(3584, 18944, 28, 28, 4, 3420, 152064), 8_292_166_656),
    "Qwen2.5-VL-72B": (qwen2_5(8192, 29568, 80, 64, 8, 3456, 152064), 73_410_777_344),
    "Qwen3-VL-2B": (qwen3(2048, 6144, 28, 16, SMALL_TOWER), 2_127_532_032),
    "Qwen3-VL-4B": (qwen3(2560, 9728, 36, 32, SMALL_TOWER), 4_437_815_808),
    "Qwen3-VL-8B": (qwen3(4096, 12288, 36, 32, LARGE_TOWER), 8_767_123_696),
    "Qwen3-VL-32B": (qwen3(5120, 25600, 64, 64, LARGE_TOWER), 33_357_390_064),
}
"""config.json -> the parameters that the hub counts in the weights."""
