"""What the benchmarks train on: random weights of a true shape, a processor for them, and chart-sized images."""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.family_shapes import BASES

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
    """Random weights, a processor and images, unless they are there."""
    begun = time.perf_counter()
    for images in dict.fromkeys(("charts", getattr(options, "images", "charts"))):
        if not (options.folder / images).is_dir():
            write_charts(options.folder / images, max(options.steps, 4) * GLOBAL_BATCH, IMAGES[images])
    kind = getattr(options, "family", "qwen2_vl")
    base = options.folder / BASES[kind]
    if not base.is_dir():
        write_base(base, options.shape, options.folder / "charts", kind)
    print(f"built weights and charts in {time.perf_counter() - begun:.0f} s", flush=True)


def write_base(folder: Path, shape: str, charts: Path, kind: str = "qwen2_vl") -> None:
    """A family's model with random weights; the vocabulary's size is true, its tokens are trained on the questions."""
    import pyarrow.parquet as pq
    import torch
    import transformers

    from benchmarks.family_shapes import family_config, family_processor
    from launch.atomic_files import atomic_dir
    from launch.inputs.families import FAMILIES
    from launch.recipe.loading import find_recipe, load_recipe
    from trainer.embedded.tiny_model import train_tokenizer

    recipe = load_recipe(find_recipe(RECIPE))
    questions = pq.read_table(charts / "train-00000.parquet", columns=["query"]).column("query").to_pylist()
    tokenizer = train_tokenizer([recipe.data.system_message, *questions], vocab_size=2048)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, FAMILIES[kind].model_class)(family_config(kind, shape, tokenizer))
    torch.set_default_dtype(torch.float32)
    with atomic_dir(folder) as aside:
        model.save_pretrained(aside, max_shard_size="4GB")
        family_processor(kind, tokenizer).save_pretrained(aside)


def chart_size(draw: random.Random) -> tuple[int, int]:
    """(width, height) in pixels, as ChartQA's three sources have them (60, 20 and 20 %)."""
    kind = draw.random()
    if kind < 0.6:
        return 800, draw.randint(500, 1000)
    if kind < 0.8:
        return draw.randint(309, 640), draw.randint(300, 900)
    return 850, 600


def square_size(_: random.Random) -> tuple[int, int]:
    """1,849 visual tokens of Qwen2-VL, so samples of about 1,970."""
    return 1204, 1204


IMAGES = {"charts": chart_size, "squares": square_size}


def write_charts(
    folder: Path, count: int, size: Callable[[random.Random], tuple[int, int]] = chart_size
) -> None:
    """`count` training rows of ChartQA's schema with images of these sizes, and a few for the other splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from launch.atomic_files import atomic_dir

    with atomic_dir(folder) as aside:
        for seed, (split, rows) in enumerate(
            (("train", count), ("val", GLOBAL_BATCH), ("test", GLOBAL_BATCH))
        ):
            draw = random.Random(seed)
            pq.write_table(
                pa.Table.from_pylist([chart_row(draw, size) for _ in range(rows)]),
                aside / f"{split}-00000.parquet",
            )


def chart_row(draw: random.Random, size: Callable[[random.Random], tuple[int, int]]) -> dict[str, Any]:
    """One bar chart and a question."""
    from PIL import Image, ImageDraw

    width, height = size(draw)
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
    base = options.folder / BASES[getattr(options, "family", "qwen2_vl")]
    images = options.folder / getattr(options, "images", "charts")
    own = [f"model.name_or_path={base}", f"data.dataset={images}", *options.set]
    return recipe_settings(options.folder, options.steps, own, training__warmup_steps=1)
