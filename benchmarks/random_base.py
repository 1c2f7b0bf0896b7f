"""What the benchmarks train on: random weights of a true shape, a processor for them, and chart-sized images."""

from __future__ import annotations

import argparse
import io
import random
import time
from pathlib import Path
from typing import Any

RECIPE = "qwen2vl_7b_chartqa"

GLOBAL_BATCH = 32


def recipe_settings(folder: Path, steps: int, asked: list[str], **changes: int) -> list[str]:
    """The recipe on what `build` wrote, nothing evaluated, saved at the end alone: `--set` arguments.

    `changes`: section__key; `asked`: settings of the user, which win.
    """
    values = {
        "model.name_or_path": folder / "base",
        "data.dataset": folder / "charts",
        "training.max_steps": steps,
        "training.logging_steps": 5,
        "evaluation.every_steps": 10 * steps,
        "checkpoint.every_steps": 10 * steps,
        "tracking.report_to": "none",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    settings = [f"{key}={value}" for key, value in values.items()] + asked
    return [argument for setting in settings for argument in ("--set", setting)]


def build(options: argparse.Namespace) -> None:
    """Random weights, a processor and charts, unless they are there."""
    begun = time.perf_counter()
    if not (options.folder / "charts").is_dir():
        write_charts(options.folder / "charts", max(options.steps, 4) * GLOBAL_BATCH)
    if not (options.folder / "base").is_dir():
        write_base(options.folder / "base", options.shape, options.folder / "charts")
    print(f"built weights and charts in {time.perf_counter() - begun:.0f} s", flush=True)


def write_base(folder: Path, shape: str, charts: Path) -> None:
    """A Qwen2-VL with random weights; the vocabulary's size is true, its tokens are trained on the questions."""
    import pyarrow.parquet as pq
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from launch.atomic_files import atomic_dir
    from launch.recipe.loading import find_recipe, load_recipe
    from trainer.embedded.tiny_model import TinyShape, make_processor, train_tokenizer

    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"))
    questions = pq.read_table(charts / "train-00000.parquet", columns=["query"]).column("query").to_pylist()
    tokenizer = train_tokenizer([recipe.data.system_message, *questions], vocab_size=2048)
    processor = make_processor(tokenizer, TinyShape(min_pixels=3136, max_pixels=12845056))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(base_config(shape, tokenizer))
    torch.set_default_dtype(torch.float32)
    with atomic_dir(folder) as aside:
        model.save_pretrained(aside, max_shard_size="4GB")
        processor.save_pretrained(aside)


def base_config(shape: str, tokenizer: Any) -> Any:
    """The configuration of Qwen2-VL-7B-Instruct, or a narrow one."""
    from transformers import Qwen2VLConfig

    tiny = shape == "tiny"
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    hidden = 128 if tiny else 3584
    return Qwen2VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 256 if tiny else 18944,
            "num_hidden_layers": 2 if tiny else 28,
            "num_attention_heads": 4 if tiny else 28,
            "num_key_value_heads": 2 if tiny else 4,
            "vocab_size": 2304 if tiny else 152064,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6] if tiny else [16, 24, 24],
            },
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2 if tiny else 32,
            "embed_dim": 64 if tiny else 1280,
            "num_heads": 4 if tiny else 16,
            "hidden_size": hidden,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
        tie_word_embeddings=False,
        **ids,
    )


def write_charts(folder: Path, count: int) -> None:
    """`count` training rows of ChartQA's schema with images of ChartQA's sizes, and a few for the other splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from launch.atomic_files import atomic_dir

    with atomic_dir(folder) as aside:
        for seed, (split, rows) in enumerate(
            (("train", count), ("val", GLOBAL_BATCH), ("test", GLOBAL_BATCH))
        ):
            draw = random.Random(seed)
            pq.write_table(
                pa.Table.from_pylist([chart_row(draw) for _ in range(rows)]), aside / f"{split}-00000.parquet"
            )


def chart_size(draw: random.Random) -> tuple[int, int]:
    """(width, height) in pixels, as ChartQA's three sources have them (60, 20 and 20 %)."""
    kind = draw.random()
    if kind < 0.6:
        return 800, draw.randint(500, 1000)
    if kind < 0.8:
        return draw.randint(309, 640), draw.randint(300, 900)
    return 850, 600


def chart_row(draw: random.Random) -> dict[str, Any]:
    """One bar chart and a question."""
    from PIL import Image, ImageDraw

    width, height = chart_size(draw)
    image = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(image)
    for bar in range(8):
        top = draw.randint(10, height - 10)
        colour = tuple(draw.randint(0, 255) for _ in range(3))
        canvas.rectangle(
            [int(width * (bar + 0.1) / 8), top, int(width * (bar + 0.9) / 8), height], fill=colour
        )
        canvas.text((int(width * bar / 8), 5 + 10 * (bar % 4)), str(draw.randint(0, 99999)), fill=(0, 0, 0))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    question = draw.choice(
        [
            "What is the value of the {}-th bar?",
            "How many bars are above {} in the chart of U.S. adults?",
            "What percentage of respondents chose option {} in 2019?",
        ]
    ).format(draw.randint(1, 9))
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "query": question,
        "label": [str(draw.randint(0, 9999))],
        "human_or_machine": 0,
    }


def recipe_arguments(options: argparse.Namespace) -> list[str]:
    """What all sides change in the default recipe."""
    return recipe_settings(options.folder, options.steps, options.set, training__warmup_steps=1)
