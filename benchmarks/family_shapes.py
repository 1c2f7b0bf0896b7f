"""The configurations of the published 7B and 8B models of each family, or narrow ones, for random weights."""

from __future__ import annotations

from typing import Any

BASES = {
    "qwen2_vl": "base",
    "qwen2_5_vl": "base-qwen2_5_vl",
    "qwen3_vl": "base-qwen3_vl",
}
"""Where the benchmarks keep a family's random base."""

_WIDTHS = {
    "qwen2_vl": (3584, 18944, 28, 28, 4, 152064),
    "qwen2_5_vl": (3584, 18944, 28, 28, 4, 152064),
    "qwen3_vl": (4096, 12288, 36, 32, 8, 151936),
}
"""hidden, inner, layers, heads, heads of keys and values, vocabulary."""
_TINY_WIDTHS = (128, 256, 2, 4, 2, 2304)

_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
    "qwen2_5_vl": {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "qwen3_vl": {
        "depth": 27, "hidden_size": 1152, "num_heads": 16, "intermediate_size": 4304, "patch_size": 16,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
}  # fmt: skip
_TINY_TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 64, "num_heads": 4},
    "qwen2_5_vl": {"hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "fullatt_block_indexes": [1]},
    "qwen3_vl": {
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "deepstack_visual_indexes": [0],
    },
}


def family_config(kind: str, shape: str, tokenizer: Any) -> Any:
    """The configuration of the family `kind`; `shape`: `7b` for the published 7B or 8B, or `tiny`."""
    import transformers

    from launch.inputs.families import FAMILIES

    tiny = shape == "tiny"
    hidden, inner, layers, heads, kv_heads, vocabulary = _TINY_WIDTHS if tiny else _WIDTHS[kind]
    head = hidden // heads
    section = [head // 2 - 2 * (3 * head // 16), 3 * head // 16, 3 * head // 16]
    if kind == "qwen3_vl":
        section = [head // 2 - 2 * (5 * head // 32), 5 * head // 32, 5 * head // 32]
    out = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
    vision = _TOWERS[kind] | (_TINY_TOWERS[kind] | {"depth": 2} if tiny else {}) | {out: hidden}
    tokens = {"image": "image_pad", "video": "video_pad"}
    tokens |= {name: name for name in ("vision_start", "vision_end")}
    return getattr(transformers, FAMILIES[kind].config_class)(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6 if kind == "qwen3_vl" else 1e6,
                "mrope_section": section,
            },
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **({"head_dim": head} if kind == "qwen3_vl" else {}),
        },
        vision_config={
            **vision,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        tie_word_embeddings=False,
        **{
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for name, token in tokens.items()
        },
    )


def family_processor(kind: str, tokenizer: Any) -> Any:
    """The family's processor with the bounds that its published models have."""
    import transformers

    from launch.inputs.families import FAMILIES
    from trainer.embedded.tiny_model import CHAT_TEMPLATE

    newest = kind == "qwen3_vl"
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    if not newest:
        size = {"shortest_edge": 3136, "longest_edge": 12845056}
    video = transformers.Qwen3VLVideoProcessor if newest else transformers.Qwen2VLVideoProcessor
    return getattr(transformers, FAMILIES[kind].processor_class)(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), patch_size=16 if newest else 14),
        video_processor=video(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
