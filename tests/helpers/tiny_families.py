"""Tiny random bases of every family besides Qwen2-VL: true architecture and processor, small numbers, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from launch.inputs.families import FAMILIES
from trainer.embedded.tiny_model import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    SMALL_CORPUS,
    TURN_END,
    TinyShape,
    make_model,
    make_processor,
    train_tokenizer,
)

TOWER_KEYS = {
    "qwen2_5_vl": {
        "window_size": 56, "fullatt_block_indexes": [1], "intermediate_size": 128, "out_hidden_size": 64,
        "patch_size": 14,
    },
    "qwen3_vl": {
        "deepstack_visual_indexes": [0, 1], "intermediate_size": 128, "out_hidden_size": 64, "patch_size": 16,
        "num_position_embeddings": 64,
    },
}  # fmt: skip
"""Two blocks: one in windows of 2 x 2 visual tokens, one of whole images; or both with features for the decoder."""


def write_tiny(
    kind: str, folder: Path, *, seed: int = 0, initializer_range: float = 0.02, max_tokens: int = 32
) -> Path:
    """A base of the family `kind` with random weights in `folder`, 4 to `max_tokens` visual tokens an image."""
    tokenizer = train_tokenizer(SMALL_CORPUS, vocab_size=448)
    edge = 32 if kind == "qwen3_vl" else 28
    shape = TinyShape(
        initializer_range=initializer_range, min_pixels=4 * edge**2, max_pixels=max_tokens * edge**2
    )
    if kind == "qwen2_vl":
        make_model(tokenizer, shape, seed).save_pretrained(folder)
        make_processor(tokenizer, shape).save_pretrained(folder)
        return folder
    family = FAMILIES[kind]
    config = getattr(transformers, family.config_class)(**_sizes(kind, tokenizer, initializer_range))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.model_class)(config)
    vocabulary = tokenizer.get_vocab()
    model.generation_config.eos_token_id = [vocabulary[TURN_END], vocabulary[END_OF_TEXT]]
    model.generation_config.pad_token_id = vocabulary[END_OF_TEXT]
    model.save_pretrained(folder)
    _processor(kind, tokenizer, edge, shape).save_pretrained(folder)
    return folder


def _sizes(kind: str, tokenizer: Any, initializer_range: float) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    # Qwen3-VL's heads are wider than hidden / heads, as in its 4B and 32B.
    head = {"head_dim": 32} if kind == "qwen3_vl" else {}
    section = [8, 4, 4] if kind == "qwen3_vl" else [4, 2, 2]
    return {
        "text_config": {
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3 if kind == "qwen3_vl" else 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "initializer_range": initializer_range,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "bos_token_id": vocabulary[END_OF_TEXT],
            "eos_token_id": vocabulary[TURN_END],
            "pad_token_id": vocabulary[END_OF_TEXT],
            **head,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "initializer_range": initializer_range,
            **TOWER_KEYS[kind],
        },
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
        "tie_word_embeddings": False,
    }


def _processor(kind: str, tokenizer: Any, edge: int, shape: TinyShape) -> Any:
    size = {"shortest_edge": shape.min_pixels, "longest_edge": shape.max_pixels}
    video = transformers.Qwen3VLVideoProcessor if kind == "qwen3_vl" else transformers.Qwen2VLVideoProcessor
    return getattr(transformers, FAMILIES[kind].processor_class)(
        image_processor=transformers.Qwen2VLImageProcessor(size=dict(size), patch_size=edge // 2),
        video_processor=video(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def hub_names(folder: Path) -> None:
    """Give the tensors in `folder` the names that the hub has for Qwen2-VL and Qwen2.5-VL."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, file, {"format": "pt"})
