"""Optimizer steps of the default recipe against plain trl: same weights, same samples, one GPU, one command.

    python benchmarks/throughput.py                                          # the 7B shape with random weights
    python benchmarks/throughput.py --set lora.lora_dropout=0 --fp32-adapters   # losses comparable step by step
    python benchmarks/throughput.py --sides samestep --steps 8 --profile     # what the GPU does in two of our steps
    python benchmarks/throughput.py --shape tiny --steps 4                   # a smoke run, also on a CPU
    python benchmarks/throughput.py --family qwen3_vl --sides samestep-cached   # another family's 7B or 8B
    python benchmarks/throughput.py --images squares --sides samestep        # larger images: samples of 1,970 tokens

Builds random weights of the true shape and chart-sized images first (`--folder`, reused when it is there), then runs
each side in a process of its own:

    samestep         the recipe as it is
    samestep-cached  with data.vision_cache=memory: one pass over all images fills it, the steps after that count
    samestep-disk    with data.vision_cache=disk, filled by `samestep prepare --vision` before: every step is a hit
    tuned            trl: micro-batches of 8 x 4, no gradient checkpointing, 8 data workers
    notebook         trl as the notebook uses it: micro-batches of 4 x 8, gradient checkpointing, no data workers
    swift            ms-swift, padding-free with Liger's kernels: micro-batches of 16 x 2, no gradient checkpointing,
                     8 data workers; `--swift-python` names the Python of an environment that has it (its pins differ)

All of them score the answer alone. Time counts from step end to step end, so that fetching data is in it; medians leave
out the first two steps and profiled ones. What is done is written to `--output` at once; a table, the losses and one
JSON line come at the end, also of a call that is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.family_shapes import BASES
from benchmarks.launching import family, kill_all
from benchmarks.random_base import IMAGES, build
from benchmarks.throughput_report import finished, report

OURS = ("samestep", "samestep-cached", "samestep-disk")
SIDES = (*OURS, "tuned", "notebook", "swift")
DEFAULT_SIDES = ("samestep", "samestep-cached", "tuned", "notebook")
CEILING = "ceiling"  # not a side: the matrix product alone
BEGAN = time.monotonic()


def say(words: str) -> None:
    """With the time of day and the seconds since the start."""
    print(f"[{time.strftime('%H:%M:%S')} +{time.monotonic() - BEGAN:.0f} s] {words}", flush=True)


def main() -> None:
    """Build, run the sides, print."""
    options = parse()
    os.environ["SAMESTEP_CACHE"] = str(options.folder / "cache")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.side:
        print("RESULT " + json.dumps(measure(options)), flush=True)
        return
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM")
    )  # a time limit: print what there is
    if options.build_only:
        build(options)
        return
    say(f"building what is missing in {options.folder}")
    shared = ["--folder", str(options.folder), "--shape", options.shape, "--steps", str(options.steps)]
    shared += ["--family", options.family, "--images", options.images]
    # In a process of its own: what PyTorch has once had of a GPU's memory it keeps.
    subprocess.run([sys.executable, __file__, "--build-only", *shared], check=True)
    facts = {"family": options.family, "shape": options.shape, "steps": options.steps, "set": options.set}
    facts["images"] = options.images
    facts["trl_adapters"] = "fp32" if options.fp32_adapters else "bf16"
    results: list[dict[str, Any]] = []
    try:
        facts |= run_side(options, CEILING)
        for side in chosen_sides(options.sides):
            results.append(finished(run_side(options, side), facts["ceiling"]))
            say(f"{side}: {results[-1]['median_step_s']:.3f} s a step")
            options.output.write_text(json.dumps({**facts, "results": results}, indent=1))
    finally:
        report(facts, results)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=["7b", "tiny"], default="7b", help="of the random base (default: 7b)"
    )
    parser.add_argument(
        "--family", choices=list(BASES), default="qwen2_vl", help="of the random base (default: qwen2_vl)"
    )
    parser.add_argument(
        "--images",
        choices=list(IMAGES),
        default="charts",
        help="of ChartQA's sizes, or squares of 1204 pixels (default: charts)",
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each side (default: 20)")
    parser.add_argument(
        "--notebook-steps", type=int, help="of the notebook's side, which is slow (default: all)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="weights, charts, runs"
    )
    parser.add_argument("--output", type=Path, help="JSON (default: throughput.json in the folder)")
    parser.add_argument("--sides", default=",".join(DEFAULT_SIDES), help=f"of {', '.join(SIDES)}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe value, all sides"
    )
    parser.add_argument(
        "--profile", action="store_true", help="two steps of our sides: kernels, busy share, waits"
    )
    parser.add_argument(
        "--fp32-adapters",
        action="store_true",
        help="trl's sides train the fp32 adapters that ours train; trl 1.16 itself rounds them to bf16",
    )
    parser.add_argument(
        "--swift-python", default=sys.executable, help="the Python that has ms-swift (default: this one)"
    )
    parser.add_argument(
        "--swift-batch", type=int, choices=[8, 16, 32], default=16, help="samples a micro-batch (default: 16)"
    )
    parser.add_argument("--build-only", action="store_true", help="weights and charts, then end")
    parser.add_argument("--side", choices=(*SIDES, CEILING), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    options.output = options.output or options.folder / "throughput.json"
    options.notebook_steps = min(options.notebook_steps or options.steps, options.steps)
    if wrong := [side for side in options.sides.split(",") if side and side not in SIDES]:
        parser.error(f"--sides: there is no {', '.join(wrong)}; choose of {', '.join(SIDES)}")
    if "swift" in options.sides.split(",") and not has_swift(options.swift_python):
        parser.error(
            f"--swift-python: {options.swift_python} has no ms-swift; install ms-swift==4.6.0 for it"
        )
    return options


def has_swift(python: str) -> bool:
    """Without importing it, which takes long."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    check = "import sys; from importlib.util import find_spec; sys.exit(find_spec('swift') is None)"
    try:
        return subprocess.run([python, "-c", check], env=environment, cwd="/").returncode == 0
    except OSError:
        return False


def chosen_sides(asked: str) -> list[str]:
    """Without those that this version of samestep has not."""
    from launch.recipe.schema import Recipe

    data: Any = Recipe.model_fields["data"].annotation
    sides = [side for side in asked.split(",") if side]
    if "vision_cache" in data.model_fields:
        return sides
    for side in sides:
        if side in OURS[1:]:
            say(f"{side}: left out, this version has no data.vision_cache")
    return [side for side in sides if side not in OURS[1:]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    if options.side == CEILING:
        from benchmarks.flops import matrix_product_ceiling

        return {"ceiling": matrix_product_ceiling(), "heated_ceiling": matrix_product_ceiling(heated_s=3.0)}
    from benchmarks import throughput_sides

    if options.side == "swift":
        from benchmarks.swift_side import run_swift

        return run_swift(options)
    if options.side in OURS:
        return throughput_sides.run_samestep(options)
    return throughput_sides.run_trl(options)


def run_side(options: argparse.Namespace, side: str) -> dict[str, Any]:
    """One side in a fresh process, whose output is shown; nothing of it outlives the call."""
    say(f"{side}: begins")
    command = [sys.executable, __file__, "--side", side, "--shape", options.shape, "--family", options.family]
    command += ["--images", options.images]
    command += ["--steps", str(options.steps), "--notebook-steps", str(options.notebook_steps)]
    command += ["--swift-python", options.swift_python, "--swift-batch", str(options.swift_batch)]
    command += ["--folder", str(options.folder)] + ["--profile"] * options.profile
    command += ["--fp32-adapters"] * options.fp32_adapters
    command += [argument for value in options.set for argument in ("--set", value)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    result: dict[str, Any] = {}
    try:
        for line in process.stdout:
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
            else:
                print(line, end="", flush=True)
        process.wait()
    finally:
        kill_all(family(process.pid))
    if process.returncode or not result:
        raise SystemExit(f"{side} failed")
    return result


if __name__ == "__main__":
    main()
