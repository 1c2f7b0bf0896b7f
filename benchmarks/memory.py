"""Planned against measured memory: one training step of the 7B shape on a GPU for each of several settings.

Random weights, chart-sized images, our packed forward and backward with the kernels of the machine; no optimizer
step, whose moments are allocated at the start instead. `python benchmarks/memory.py --folder F` needs one GPU, 17 GB
of disk below F (weights and charts are those of `throughput.py`, made when they are not there) and about 2 minutes.
With `--cap-gib 24` the default recipe is planned for the whole GPU and may take 24 GiB of it: its settings come down
before the first of three steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.family_shapes import BASES
from benchmarks.random_base import build, recipe_arguments

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Index
    from launch.recipe.schema import Recipe

CASES = "resident/0/8 resident/0/16 packed/0/8 packed/2/16 packed/1/4 packed/1/16"


@dataclass(frozen=True)
class Case:
    """4-bit weights held dequantized or not, every n-th layer recomputed, samples in the micro-batch."""

    resident: bool
    every: int
    samples: int

    @staticmethod
    def of(text: str) -> Case:
        """From `resident/0/8` or `packed/2/16`."""
        kept, every, samples = text.split("/")
        return Case(kept == "resident", int(every), int(samples))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="of the base (default: 7b)")
    parser.add_argument(
        "--family", choices=list(BASES), default="qwen2_vl", help="of the base (default: qwen2_vl)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="weights and charts"
    )
    parser.add_argument("--cases", default=CASES, help=f"settings (default: {CASES})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe value, all cases"
    )
    parser.add_argument("--cap-gib", type=float, help="instead: train with so much of the GPU's memory")
    options = parser.parse_args()
    options.steps = 3 if options.cap_gib else 20
    os.environ["SAMESTEP_CACHE"] = str(options.folder / "cache")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    build(options)
    if options.cap_gib:
        come_down(options)
        return
    report(options, measure(options, [Case.of(text) for text in options.cases.split()]))


def come_down(options: argparse.Namespace) -> None:
    """Three steps of the default recipe on a GPU that has less than its plan was told."""
    import shutil

    import torch

    from trainer.metrics_log import read_lines
    from trainer.train import main as train

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
    run = options.folder / "runs" / "capped"
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["qwen2vl_7b_chartqa", "--runs-dir", str(run.parent), "--name", run.name]
    status = train([*arguments, *recipe_arguments(options)])
    plan = json.loads((run / "plan.json").read_text())
    shown = ("micro_batch_tokens", "micro_batches", "resident_weights", "recompute_every", "settings_reason")
    figures = {name: plan[name] for name in (*shown, "settings_tried", "planned_memory")} | {
        "cap_gib": options.cap_gib,
        "status": status,
        "peak": peak(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "steps": [(line["loss"], line["seconds"]) for line in read_lines(run / "metrics.jsonl")]
        if not status
        else [],
        "weights": f"random, {options.shape}",
    }
    for name, value in figures.items():
        print(f"  {name}: {value}")
    print(json.dumps(figures))


def measure(options: argparse.Namespace, cases: list[Case]) -> list[dict[str, Any]]:
    """Peaks of the allocator while loading and while training, planned and found, in bytes.

    One model for all: the cases with 4-bit weights come first, then its weights are dequantized.
    """
    import torch

    from launch.recipe.loading import find_recipe, load_recipe
    from trainer.model.base import RECIPE_DTYPES, compute_in, load_base, prepare_training
    from trainer.model.lora import add_lora, trainable_parameters
    from trainer.model.resident import dequantize_weights
    from trainer.prepare import prepare

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"), recipe_arguments(options)[1::2])
    index = prepare(recipe, quiet=True)
    clear(device)
    base = load_base(recipe, device)
    loading = peak(device)
    model = add_lora(base, recipe)
    compute_dtype = RECIPE_DTYPES[recipe.quantization.bnb_4bit_compute_dtype]
    way = prepare_training(model, recipe, compute_dtype=compute_dtype)
    compute_in(model, compute_dtype)
    model.train()
    parameters = list(trainable_parameters(model).values())
    moments = [torch.zeros_like(parameter) for parameter in parameters for _ in range(2)]
    dequantized, results = False, []
    for case in sorted(cases, key=lambda case: case.resident):
        if case.resident and not dequantized:
            dequantized = dequantize_weights(base, compute_dtype) > 0
        language = base.model.language_model
        language.activation_checkpointing_disable()
        if case.every:
            language.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=case.every)
        results.append(
            {
                "way": way,
                "loading_measured": loading,
                **run_case(recipe, index, model, parameters, case, device),
            }
        )
    del moments
    return results


def run_case(
    recipe: Recipe, index: Index, model: Any, parameters: list[Any], case: Case, device: Any
) -> dict[str, Any]:
    """Forward and backward of two micro-batches; the second finds gradients and what the libraries keep."""
    import torch

    from launch.inputs.families import read_shape
    from launch.planning.auto_settings import Gpus, kernels_of
    from launch.planning.memory import memory_of
    from launch.planning.memory_load import Packed, Settings, load_of
    from launch.planning.step_plan import MicroBatch
    from trainer.data.encoder import Encoder
    from trainer.data.micro_batches import assemble
    from trainer.data.splits import open_split
    from trainer.model.base import RECIPE_DTYPES
    from trainer.pretrained import load_processor

    encoder = Encoder(
        load_processor(recipe),
        recipe.data.system_message,
        recipe.data.loss,
        pixels=RECIPE_DTYPES[recipe.model.dtype],
    )
    rows, split = open_split(recipe, "train"), index.splits["train"]
    numbers = [tuple(range(first, first + case.samples)) for first in (0, case.samples)]
    batches = [
        assemble(rows, split, encoder, MicroBatch(chosen, filler=False), 0, 100)["inputs"]
        for chosen in numbers
    ]
    for parameter in parameters:
        parameter.grad = None
    clear(device)
    losses, began = [], time.perf_counter()
    for inputs in batches:
        moved: dict[str, Any] = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in inputs.items()
        }
        loss = -model(**moved).log_probs.float().sum() / 100
        loss.backward()
        losses.append(loss.item())
        del moved, loss
    measured, seconds = peak(device), time.perf_counter() - began
    packed = max(
        (
            Packed(
                inputs["input_ids"].numel(),
                inputs["fresh_positions"].numel(),
                inputs["scored_positions"].numel(),
                sum(inputs["text_lengths"]),
            )
            for inputs in batches
        ),
        key=lambda packed: packed.tokens,
    )
    shape = read_shape(recipe)
    if isinstance(shape, str):
        raise SystemExit(shape)
    load = load_of(recipe, shape, "single", 1, kernels_of(recipe, Gpus(device.type)))
    planned = memory_of(load, packed, Settings(case.resident, case.every))
    return asdict(case) | {
        "tokens": packed.tokens,
        "visual_tokens": packed.visual_tokens,
        "loading_planned": planned.loading,
        "training_planned": planned.training,
        "training_measured": measured,
        "loss": losses,
        "seconds": round(seconds, 2),
    }


def clear(device: Any) -> None:
    """Forget what was there, and the peak."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: Any) -> int:
    """Bytes that the allocator handed out at most since `clear`; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def report(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """The table and the JSON line."""
    import torch
    from rich.console import Console
    from rich.table import Table

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(
        title=f"peak of PyTorch's allocator, GiB; random weights ({options.family}, {options.shape}), {machine}"
    )
    for column in (
        "weights",
        "recomputed",
        "samples",
        "tokens",
        "loading",
        "planned",
        "training",
        "planned",
        "off by",
    ):
        table.add_column(column)
    for result in results:
        measured = result["training_measured"]
        table.add_row(
            "dequantized" if result["resident"] else "4 bits",
            {0: "none", 1: "all"}.get(result["every"], f"every {result['every']}."),
            str(result["samples"]),
            f"{result['tokens']:,}",
            *(
                f"{result[f'{moment}_{kind}'] / 2**30:.2f}"
                for moment in ("loading", "training")
                for kind in ("measured", "planned")
            ),
            f"{result['training_planned'] / measured - 1:+.1%}" if measured else "",
        )
    Console(width=120).print(table)
    print(results[0]["way"])
    print(
        json.dumps(
            {
                "machine": machine,
                "family": options.family,
                "shape": options.shape,
                "torch": torch.__version__,
                "weights": "random",
            }
            | {"results": results}
        )
    )


if __name__ == "__main__":
    main()
