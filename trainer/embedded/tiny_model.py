"""The tiny Qwen2-VL that needs no download: true architecture, processor, chat template and tokenizer, small numbers.

`random_tiny` writes one with random weights in a second; `trainer.embedded.pretrain` one that was trained on charts.
"""

import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from launch.atomic_files import atomic_dir

VISUAL_TOKEN_PIXELS = 28 * 28
"""Pixels behind one visual token: a 2 x 2 merge of 14 x 14 patches."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT, TURN_START, TURN_END,
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen2-VL's special tokens in Qwen2-VL's order."""

CHAT_TEMPLATE = """\
{%- macro vision(kind) -%}<|vision_start|><|{{ kind }}_pad|><|vision_end|>{%- endmacro -%}
{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.images = seen.images + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
{{- vision('image') -}}
{%- elif part.type == 'video' or 'video' in part -%}
{%- set seen.videos = seen.videos + 1 -%}
{%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
{{- vision('video') -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""
"""Renders what Qwen2-VL's own template renders (ChatML, a default system turn, vision markers in place)."""

SMALL_CORPUS = (
    "".join(string.printable),
    "system\nYou are a helpful assistant.",
    "user\nWhat is the value of the red bar? assistant\n7",
    "How many bars are there in the chart? Which colour is the largest? Is blue greater than green? Yes No",
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny Qwen2-VL. Every width is a multiple of 64, the block that NF4 shares one scale over."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 128
    vision_width: int = 64
    vision_depth: int = 2
    vision_heads: int = 2
    vision_mlp_ratio: int = 2
    rope_theta: float = 1e6
    initializer_range: float = 0.02
    min_pixels: int = 4 * VISUAL_TOKEN_PIXELS
    max_pixels: int = 32 * VISUAL_TOKEN_PIXELS

    def __post_init__(self) -> None:
        widths = (self.hidden, self.mlp, self.vision_width, self.vision_width * self.vision_mlp_ratio)
        if any(width % 64 for width in widths) or self.hidden % (self.heads * 16):
            raise ValueError(f"TinyShape: widths must be multiples of 64 and heads of 16 (got {self})")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer in Qwen2's form, trained on `texts`; every text comes back from its ids.

    `vocab_size` bounds the merges; the 256 bytes are always there and the special tokens come after.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    texts = list(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    learnt = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]  # annotated as text, needed as pairs
    # transformers 5 ignores vocab_file= and merges_file= here without a word: give the objects, then look.
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        unk_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=32768,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    for text in texts[:64]:
        if tokenizer.decode(tokenizer(text).input_ids) != text:
            raise RuntimeError(f"tiny tokenizer: a text does not come back from its ids ({text[:80]!r})")
    return tokenizer


def make_processor(tokenizer: Qwen2Tokenizer, shape: TinyShape) -> Qwen2VLProcessor:
    """Qwen2-VL's processor around `tokenizer`, with the pixel bounds of `shape`."""
    size = {"shortest_edge": shape.min_pixels, "longest_edge": shape.max_pixels}
    return Qwen2VLProcessor(  # type: ignore[no-untyped-call]
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        video_processor=Qwen2VLVideoProcessor(size=dict(size)),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Qwen2Tokenizer, shape: TinyShape, seed: int) -> Qwen2VLForConditionalGeneration:
    """A random fp32 Qwen2-VL of `shape`; the weights depend on `seed` only (the global random state is kept)."""

    def token_id(token: str) -> int:
        return tokenizer.get_vocab()[token]

    pairs = shape.hidden // shape.heads // 2  # rotary frequencies of a head; Qwen2-VL splits them 2 : 3 : 3
    spatial = 3 * pairs // 8
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "initializer_range": shape.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": [pairs - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": token_id(END_OF_TEXT),
            "eos_token_id": token_id(TURN_END),
            "pad_token_id": token_id(END_OF_TEXT),
        },
        vision_config={
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_width,
            "hidden_size": shape.hidden,
            "num_heads": shape.vision_heads,
            "mlp_ratio": shape.vision_mlp_ratio,
            "initializer_range": shape.initializer_range,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [token_id(TURN_END), token_id(END_OF_TEXT)]
    model.generation_config.pad_token_id = token_id(END_OF_TEXT)
    return model


def random_tiny(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    texts: Sequence[str] = SMALL_CORPUS,
) -> None:
    """Write an untrained tiny Qwen2-VL (weights, tokenizer, processor) to `folder`; no charts needed, a second.

    For tests of distribution and parity: random weights, 4 to 32 visual tokens an image.
    """
    shape = TinyShape(hidden=hidden, layers=layers, mlp=2 * hidden)
    tokenizer = train_tokenizer(texts, vocab_size=448)
    with atomic_dir(folder) as aside:
        make_model(tokenizer, shape, seed).save_pretrained(aside)
        make_processor(tokenizer, shape).save_pretrained(aside)
