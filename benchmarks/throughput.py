"""Optimizer steps of the default recipe against plain trl: same weights, same samples, one GPU, one command.

    python benchmarks/throughput.py                    # the 7B shape with random weights, 20 steps, one GPU
    python benchmarks/throughput.py --shape tiny       # a smoke run, also on a CPU

Builds random weights of the true shape and chart-sized images first (`--folder`, reused when it is there), then runs
each side in a process of its own and prints a table and one JSON line. `notebook` is trl as the notebook uses it
(micro-batches of 4 x 8, gradient checkpointing, no data workers). Time counts from step end to step end, so that
fetching data is in it; the median leaves the first two steps out.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import random
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIDES = ("samestep", "notebook")
WARM_UP = 2
GLOBAL_BATCH = 32


def main() -> None:
    """Build, run both sides, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=["7b", "tiny"], default="7b", help="of the random base (default: 7b)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each side (default: 20)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="weights, charts, runs"
    )
    parser.add_argument("--sides", default=",".join(SIDES), help=f"which to run (default: {','.join(SIDES)})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe value, both sides"
    )
    parser.add_argument("--build-only", action="store_true", help="weights and charts, then end")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["SAMESTEP_CACHE"] = str(options.folder / "cache")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.side:
        print(
            "RESULT " + json.dumps(run_samestep(options) if options.side == "samestep" else run_trl(options))
        )
        return
    build(options)
    if options.build_only:
        return
    results = [run_side(options, side) for side in options.sides.split(",")]
    report(options, results)


# --- what both sides train on ----------------------------------------------------------------------------------


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

    from launch.folders import published
    from launch.recipe import find_recipe, load_recipe
    from trainer.model.tiny import TinyShape, make_processor, train_tokenizer

    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"))
    questions = pq.read_table(charts / "train-00000.parquet", columns=["query"]).column("query").to_pylist()
    tokenizer = train_tokenizer([recipe.data.system_message, *questions], vocab_size=2048)
    processor = make_processor(tokenizer, TinyShape(min_pixels=3136, max_pixels=12845056))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(base_config(shape, tokenizer))
    torch.set_default_dtype(torch.float32)
    with published(folder) as aside:
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

    from launch.folders import published

    with published(folder) as aside:
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
    """The default recipe on the built weights and charts, nothing saved or evaluated in between."""
    values = {
        "model.name_or_path": options.folder / "base",
        "data.dataset": options.folder / "charts",
        "training.max_steps": options.steps,
        "training.logging_steps": 5,
        "evaluation.every_steps": 10 * options.steps,
        "checkpoint.every_steps": 10 * options.steps,
        "tracking.report_to": "none",
    }
    settings = [f"{key}={value}" for key, value in values.items()] + options.set
    return [argument for setting in settings for argument in ("--set", setting)]


# --- the sides ---------------------------------------------------------------------------------------------------


def run_samestep(options: argparse.Namespace) -> dict[str, Any]:
    """`trainer.train` on one device, as `samestep run` starts it."""
    import shutil

    from trainer.records import read_lines
    from trainer.train import main as train

    runs = options.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    arguments = [
        "qwen2vl_7b_chartqa",
        "--runs-dir",
        str(runs),
        "--name",
        "benchmark",
        *recipe_arguments(options),
    ]
    saves = Saves()
    logging.getLogger("trainer").addHandler(saves)
    if status := train(arguments):
        raise SystemExit(status)
    lines = read_lines(runs / "benchmark" / "metrics.jsonl")
    return {
        "side": "samestep",
        "seconds": [line["seconds"] for line in lines],
        "loss": [line["loss"] for line in lines],
        "tokens": statistics.mean(line["tokens"] for line in lines),
        "peak_gib": peak_gib(),
        "save_seconds": saves.seconds,
    }


class Saves(logging.Handler):
    """The seconds that the training waited for each checkpoint, from the trainer's log."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"the training waited ([\d.]+) s", record.getMessage()):
            self.seconds.append(float(found[1]))


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """trl's SFTTrainer with its own collator on the same samples in the same order, the answer alone scored."""
    import torch
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from launch.plan import make_plan, step_plan
    from launch.recipe import find_recipe, load_recipe
    from trainer.data.chartqa import open_split
    from trainer.model.base import add_lora, load_base
    from trainer.prepare import prepare
    from trainer.pretrained import load_processor

    cuda = torch.cuda.is_available()
    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"), recipe_arguments(options)[1::2])
    index = prepare(recipe, quiet=True)
    plan = make_plan(
        recipe, index, strategy="single", nodes=1, gpus_per_node=1, device="cuda" if cuda else "cpu"
    )
    steps, rows = step_plan(recipe, index, plan), open_split(recipe, "train")
    text = {"role": Value("string"), "content": Value("string")}
    dataset = Dataset.from_list(
        [
            {
                "images": [{"bytes": rows[sample].image, "path": None}],
                "prompt": [
                    {"role": "system", "content": recipe.data.system_message},
                    {"role": "user", "content": rows[sample].query},
                ],
                "completion": [{"role": "assistant", "content": rows[sample].label[0]}],
            }
            for step in range(options.steps)
            for sample in steps.samples(step).tolist()
        ],
        features=Features({"images": List(ImageFeature()), "prompt": List(text), "completion": List(text)}),
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    training = recipe.training
    trainer = SFTTrainer(
        model=add_lora(load_base(recipe, torch.device("cuda", 0) if cuda else torch.device("cpu")), recipe),
        args=SFTConfig(
            output_dir=str(options.folder / "trl"),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=GLOBAL_BATCH // 4,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=plan.warmup_steps,
            max_grad_norm=training.max_grad_norm,
            optim=training.optim,
            bf16=plan.compute_dtype == "bfloat16",
            use_cpu=not cuda,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=dataset,
        processing_class=load_processor(recipe),
        callbacks=[Clock()],
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    history = trainer.state.log_history
    counted = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    return {
        "side": "notebook",
        "seconds": [round(after - before, 4) for before, after in itertools.pairwise(ends)],
        "loss": [entry["loss"] for entry in history if "loss" in entry],
        "tokens": counted[-1] / options.steps,
        "peak_gib": peak_gib(),
    }


def peak_gib() -> float | None:
    """Peak of the memory that tensors took on the GPU, GiB."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def run_side(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """One side in a fresh process; its output is shown."""
    settings = [argument for value in options.set for argument in ("--set", value)]
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--shape",
        options.shape,
        "--steps",
        str(options.steps),
    ]
    command += ["--folder", str(options.folder), *settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    result: dict[str, Any] = {}
    for line in process.stdout:
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
        else:
            print(line, end="", flush=True)
    if process.wait() or not result:
        raise SystemExit(f"{side} failed")
    median = statistics.median(result["seconds"][WARM_UP:])
    result |= {
        "median_step_s": round(median, 3),
        "samples_s": round(GLOBAL_BATCH / median, 2),
        "tokens_s": round(result["tokens"] / median),
    }
    return result


def report(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """The table and the JSON line."""
    import torch
    from rich.console import Console
    from rich.table import Table

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(
        title=f"{options.steps} steps of {GLOBAL_BATCH} samples, random weights ({options.shape}), {machine}"
    )
    for column in ("side", "s/step", "samples/s", "tokens/s", "peak GiB", "first loss", "last loss"):
        table.add_column(column)
    for result in results:
        values = [result[key] for key in ("side", "median_step_s", "samples_s", "tokens_s", "peak_gib")]
        table.add_row(*map(str, [*values, round(result["loss"][0], 4), round(result["loss"][-1], 4)]))
    Console(width=120).print(table)
    versions = {
        name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    }
    print(json.dumps({"machine": machine, "shape": options.shape, "versions": versions, "results": results}))


if __name__ == "__main__":
    main()
