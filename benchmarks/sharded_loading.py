"""fsdp without a whole base on any rank: two ranks share one GPU, each capped below the size of the 4-bit base.

Random weights of the true 7B shape, chart-sized images, a few steps. Prints each rank's peak and a JSON line.
`python benchmarks/sharded_loading.py`; needs a GPU and 40 GB of disk below --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.launching import accelerate_launch
from benchmarks.random_base import write_base, write_charts
from launch.recipe.loading import dump_recipe, recipe_from_dict


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="for weights and runs"
    )
    parser.add_argument("--cap-gib", type=float, default=5.4, help="memory of each rank (default: 5.4)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: 3)")
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="of the base (default: 7b)")
    options = parser.parse_args()
    if not (options.folder / "charts").is_dir():
        write_charts(options.folder / "charts", 64)
    if not (options.folder / "base").is_dir():
        write_base(options.folder / "base", options.shape, options.folder / "charts")
    torch.cuda.empty_cache()
    os.environ |= {"SAMESTEP_CACHE": str(options.folder / "cache"), "CAP_GIB": str(options.cap_gib)}
    recipe = options.folder / "recipe.yaml"
    recipe.write_text(dump_recipe(recipe_from_dict(recipe_values(options))))
    began = time.perf_counter()
    name = f"capped-{time.time_ns()}"
    request = [str(recipe), "--runs-dir", str(options.folder), "--name", name]
    done = accelerate_launch(2, ["benchmarks.capped_train", *request], strategy="fsdp", limit=600)
    if done.returncode:
        sys.exit(done.stdout)
    metrics = [
        json.loads(line) for line in (options.folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    figures = {
        "cap_gib": options.cap_gib,
        "peaks_gib": [float(peak) for peak in re.findall(r"peak ([0-9.]+) GiB", done.stdout)],
        "losses": [line["loss"] for line in metrics],
        "seconds": round(time.perf_counter() - began, 1),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "weights": f"random, {options.shape}",
    }
    print("two ranks on one GPU, fsdp, each capped:")
    for key, value in figures.items():
        print(f"  {key}: {value}")
    print(json.dumps(figures))


def recipe_values(options: argparse.Namespace) -> dict[str, object]:
    """One sample a micro-batch, activations recomputed."""
    return {
        "name": "capped",
        "model": {"name_or_path": str(options.folder / "base")},
        "data": {
            "dataset": str(options.folder / "charts"),
            "system_message": "Answer with a single word or number.",
        },
        "batch": {"global_batch_size": 4, "micro_batch_tokens": 2000},
        "training": {
            "max_steps": options.steps,
            "warmup_steps": 0,
            "logging_steps": 1,
            "gradient_checkpointing": True,
        },
        "evaluation": {"every_steps": 1000, "max_samples": 2},
        "tracking": {"report_to": "none"},
    }


if __name__ == "__main__":
    main()
