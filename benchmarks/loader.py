"""How fast the loader makes micro-batches, against what the GPUs of a node take. Runs on a CPU.

    python benchmarks/loader.py                          # 128 chart-sized images, one core and all of them
    python benchmarks/loader.py --gpus 8 --gpu-samples 24

Charts with the sizes of ChartQA's images, drawn here, through the processor of a Qwen2-VL (its true pixel bounds; a
tokenizer trained on their questions). One core reads, checks, decodes, resizes, tokenizes and packs as a data worker
does; then `Loader` with several workers. `--gpu-samples` is what one GPU trains a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.random_base import RECIPE, build, recipe_arguments
from launch.planning.make_plan import make_plan
from launch.planning.run_steps import step_plan
from launch.planning.topology import Topology
from launch.recipe.loading import find_recipe, load_recipe
from trainer.data import encoder, micro_batches
from trainer.data.loader import Loader
from trainer.data.splits import open_split
from trainer.prepare import prepare
from trainer.pretrained import load_processor

PARTS = ("read and check", "decode", "resize and tokenize", "pack")


def main() -> None:
    """The table, then the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="base and charts"
    )
    parser.add_argument("--steps", type=int, default=4, help="of 32 samples each (default: 4)")
    parser.add_argument("--gpus", type=int, default=8, help="of a node (default: 8)")
    parser.add_argument(
        "--gpu-samples", type=float, default=24.0, help="a second of one GPU (default: 24, of an H100)"
    )
    parser.add_argument("--workers", help="numbers to try (default: 1 and the cores there are)")
    options = parser.parse_args()
    options.shape, options.set, options.folder = "tiny", [], options.folder.absolute()
    cores = len(os.sched_getaffinity(0))
    tried = [int(count) for count in options.workers.split(",")] if options.workers else sorted({1, cores})
    os.environ |= {"SAMESTEP_CACHE": str(options.folder / "cache"), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    build(options)
    batches = batches_of(options)
    parts, single = one_core(batches)
    several = {workers: with_workers(batches, workers) for workers in tried}
    report(options, parts, single, several, cores)


def batches_of(options: argparse.Namespace) -> micro_batches.MicroBatches:
    """Of the default recipe on one GPU."""
    recipe = load_recipe(find_recipe(RECIPE), recipe_arguments(options)[1::2])
    index = prepare(recipe, quiet=True)
    plan = make_plan(recipe, index, Topology("single", 1, 1, "cpu"))
    encode = encoder.Encoder(load_processor(recipe), recipe.data.system_message, recipe.data.loss)
    steps = step_plan(recipe, index, plan)
    return micro_batches.MicroBatches(open_split(recipe, "train"), index.splits["train"], encode, steps, 0)


def one_core(batches: micro_batches.MicroBatches) -> tuple[dict[str, float], float]:
    """(milliseconds of each part a sample, samples a second), in this process without the loader."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return measured

    batches.batch(0)  # warms up
    kept = encoder.decode_image, micro_batches.pack, encoder.Encoder.__call__
    encoder.decode_image, micro_batches.pack = timed("decode", kept[0]), timed("pack", kept[1])
    encoder.Encoder.__call__ = timed("encode", kept[2])  # type: ignore[method-assign]
    samples, began = 0, time.perf_counter()
    for number in range(len(batches)):
        samples += len(batches.batch(number)["samples"])
    seconds = time.perf_counter() - began
    encoder.decode_image, micro_batches.pack = kept[0], kept[1]
    encoder.Encoder.__call__ = kept[2]  # type: ignore[method-assign]
    rest = seconds - spent["encode"] - spent["pack"]
    parts = [rest, spent["decode"], spent["encode"] - spent["decode"], spent["pack"]]
    return {name: 1e3 * part / samples for name, part in zip(PARTS, parts, strict=True)}, samples / seconds


def with_workers(batches: micro_batches.MicroBatches, workers: int) -> float:
    """Samples a second of the trainer's loader, from its first micro-batch to its last."""
    numbers = range(len(batches))
    loader = Loader(batches, numbers, total=len(batches), workers=workers, pin_memory=False)
    iterator = iter(loader)
    next(iterator)  # workers start
    began, samples = time.perf_counter(), 0
    for batch in iterator:
        samples += len(batch["samples"])
    return samples / (time.perf_counter() - began)


def report(
    options: argparse.Namespace,
    parts: dict[str, float],
    single: float,
    several: dict[int, float],
    cores: int,
) -> None:
    """The table and the JSON line."""
    from rich.console import Console
    from rich.table import Table

    needed = options.gpus * options.gpu_samples
    table = Table(
        "what", "figure", title="chart-sized images drawn here, one core a worker", title_justify="left"
    )
    for name, milliseconds in parts.items():
        table.add_row(name, f"{milliseconds:.2f} ms a sample")
    table.add_row("one core, no loader", f"{single:.1f} samples/s")
    for workers, rate in several.items():
        table.add_row(f"loader, {workers} workers on {cores} cores", f"{rate:.1f} samples/s")
    table.add_row(
        f"{options.gpus} GPUs at {options.gpu_samples:g}",
        f"{needed:.0f} samples/s: {needed / single:.1f} such cores",
    )
    Console(width=100).print(table)
    print(
        json.dumps(
            {
                "images": "drawn, sizes as ChartQA's",
                "milliseconds": parts,
                "samples_s_core": single,
                "samples_s_workers": several,
                "needed_samples_s": needed,
                "needed_cores": needed / single,
                "cores": cores,
            }
        )
    )


if __name__ == "__main__":
    main()
