"""The side `swift` of `throughput.py`: ms-swift's own training on the same samples in the same order.

ms-swift's pins are not ours, so it runs in an environment of its own, whose Python `--swift-python` names. Measured
with ms-swift 4.6.0, transformers 5.17.0, peft 0.20.0, trl 0.29.1, accelerate 1.15.0, datasets 4.8.4, liger-kernel
0.8.5, bitsandbytes 0.50.2 and qwen-vl-utils 0.0.14.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_base import GLOBAL_BATCH
from benchmarks.throughput_sides import prepared, step_flops
from launch.planning.make_plan import make_plan
from launch.planning.run_steps import step_plan
from launch.planning.step_plan import StepPlan
from launch.planning.topology import Topology
from launch.recipe.schema import Recipe
from trainer.data.splits import open_split

SCRIPT = Path(__file__).with_name("swift_training.py")


def run_swift(options: argparse.Namespace) -> dict[str, Any]:
    """Padding-free with Liger's kernels and FlashAttention-2; ms-swift leaves the tower in bfloat16."""
    recipe, index = prepared(options, "batch.prefix_sharing=false")
    plan = make_plan(recipe, index, Topology("single", 1, 1, "cuda" if torch.cuda.is_available() else "cpu"))
    steps = step_plan(recipe, index, plan)
    folder = options.folder / "swift"
    rows = write_rows(recipe, steps, options.steps, folder)
    arguments = swift_arguments(recipe, plan.warmup_steps, options)
    arguments |= {"dataset": [str(rows)], "output_dir": str(folder / "run")}
    file = folder / "arguments.json"
    file.write_text(json.dumps(arguments, indent=1))
    result = result_of([options.swift_python, str(SCRIPT), str(file)])
    places = list(range(options.steps))
    split = index.splits["train"]
    return {
        "side": options.side,
        "profiled": [],
        "tokens": [int(split.tokens[steps.samples(place)].sum()) for place in places],
        "flops": step_flops(recipe, index, steps, places, True),
        **result,
    }


def write_rows(recipe: Recipe, steps: StepPlan, count: int, folder: Path) -> Path:
    """The samples of the first `count` steps in their order, in ms-swift's own format, and their images."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    split = open_split(recipe, "train")
    lines = []
    for step in range(count):
        for sample in steps.samples(step).tolist():
            row = split[sample]
            image = images / f"{sample}.png"
            image.write_bytes(row.images[0])
            messages = [
                {"role": "system", "content": recipe.data.system_message},
                {"role": "user", "content": f"<image>{row.query}"},
                {"role": "assistant", "content": row.label[0]},
            ]
            lines.append({"messages": messages, "images": [str(image)]})
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def swift_arguments(recipe: Recipe, warmup_steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Of `SftArguments`: the recipe's values and the fastest settings; nothing is evaluated, saved or shuffled."""
    cuda = torch.cuda.is_available()
    lora, training, quantization = recipe.lora, recipe.training, recipe.quantization
    return {
        "model": str(recipe.model.name_or_path),
        "model_type": "qwen2_vl",
        "template": "qwen2_vl",
        "torch_dtype": recipe.model.dtype,
        "attn_impl": "flash_attn",
        "padding_free": True,
        "use_liger_kernel": cuda,
        "liger_kernel_config": {
            "fused_linear_cross_entropy": False
        },  # else the head computes all tokens, not the scored
        "quant_method": "bnb",
        "quant_bits": 4,
        "bnb_4bit_compute_dtype": quantization.bnb_4bit_compute_dtype,
        "bnb_4bit_quant_type": quantization.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": quantization.bnb_4bit_use_double_quant,
        "tuner_type": "lora",
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(lora.target_modules),
        "per_device_train_batch_size": options.swift_batch,
        "gradient_accumulation_steps": GLOBAL_BATCH // options.swift_batch,
        "gradient_checkpointing": False,
        "max_steps": options.steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": warmup_steps,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optim,
        "weight_decay": 0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "split_dataset_ratio": 0,
        "strict": True,
        "dataloader_num_workers": 8 if cuda else 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": ["none"],
        "disable_tqdm": True,
        "check_model": False,
        "use_cpu": not cuda,
    }


def result_of(command: list[str]) -> dict[str, Any]:
    """What `swift_training.py` measured; the rest of its output is shown."""
    ours = ("PYTHONPATH", "PYTORCH_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"USE_HF": "1", "LOG_LEVEL": "WARNING"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    result: dict[str, Any] = {}
    for line in process.stdout:
        if line.startswith("RESULT "):
            result = json.loads(line.removeprefix("RESULT "))
        else:
            print(line, end="", flush=True)
    if process.wait() or not result:
        raise SystemExit(f"ms-swift failed (exit status {process.returncode})")
    return result
