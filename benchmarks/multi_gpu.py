"""The strategies on the GPUs of one machine: the same steps, memory, speed, and what is lost to waiting.

    python benchmarks/multi_gpu.py                                   # all GPUs that are there, the 7B shape, 20 steps
    python benchmarks/multi_gpu.py --gpus 4 --runs ddp,fsdp          # `single` is taken from the last call, if it ran
    python benchmarks/multi_gpu.py --gpus 1 --per-gpu 4              # the host's share, on one GPU: 32 and 4 a step
    python benchmarks/multi_gpu.py --shape tiny --gpus 2 --steps 6   # a smoke run, also on CPUs (gloo, without fsdp)

Random weights of the true shape and chart-sized images (`--folder`, built once). Each run is one `accelerate launch`
with the shipped config and the default recipe. What is done is written to `--output` at once, and a run that is there
with the same settings is not run again unless `--fresh` says so. `per-gpu` runs have 32 samples a GPU and half of the
steps, `few` runs 4 (`--per-gpu`), what each of 8 GPUs has of 32; `single-same` takes as many a step on one GPU as
`ddp-few` on all; `random` runs deal the same samples as a shuffling sampler would. A run is held against the one on one
GPU with as many samples a step, if there is one.
Waiting and communication: of the plainly reduced strategies by the clocks of the ranks (the last to be ready, and the
addition itself), of the others by the NCCL kernels that nothing overlaps in one profiled step. Steps 1 and 2 and the
profiled one are in no time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launching import child_environment, family, kill_all, launch_command
from benchmarks.multi_gpu_figures import Measured, judge, like_for_like, report, summarize
from benchmarks.random_base import recipe_settings
from launch.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "qwen2vl_7b_chartqa"
GLOBAL_BATCH = 32
FEW = 4  # samples of each GPU, as 8 of them have of 32
PROFILED_STEP = 4
SHARDED = tuple(name for name, strategy in STRATEGIES.items() if strategy.sharded != "nothing")
BEGAN = time.monotonic()


@dataclass(frozen=True)
class Run:
    """One launch."""

    name: str
    strategy: str
    processes: int
    global_batch: int
    assignment: str
    steps: int


def runs_of(gpus: int, steps: int, few: int = FEW) -> dict[str, Run]:
    """Every run there is, by name, in the order in which they are worth their time; `few` samples a GPU in some."""
    fewer = max(6, steps // 2)
    wide = GLOBAL_BATCH * gpus
    runs = [
        Run("single", "single", 1, GLOBAL_BATCH, "balanced", steps),
        Run("ddp", "ddp", gpus, GLOBAL_BATCH, "balanced", steps),
        Run("fsdp", "fsdp", gpus, GLOBAL_BATCH, "balanced", steps),
        Run("zero2", "zero2", gpus, GLOBAL_BATCH, "balanced", steps),
        Run("zero3", "zero3", gpus, GLOBAL_BATCH, "balanced", steps),
        Run("ddp-per-gpu", "ddp", gpus, wide, "balanced", fewer),
        Run("single-few", "single", 1, few, "balanced", steps),
        *([Run("single-same", "single", 1, few * gpus, "balanced", steps)] if gpus > 1 else []),
        Run("ddp-few", "ddp", gpus, few * gpus, "balanced", steps),
        Run("ddp-random", "ddp", gpus, GLOBAL_BATCH, "random", steps),
        Run("ddp-per-gpu-random", "ddp", gpus, wide, "random", fewer),
        *[Run(f"{strategy}-per-gpu", strategy, gpus, wide, "balanced", fewer) for strategy in SHARDED],
    ]
    return {run.name: run for run in runs}


DEFAULT_RUNS = (
    "single",
    "ddp",
    "fsdp",
    "zero2",
    "zero3",
    "ddp-per-gpu",
    "single-same",
    "ddp-few",
    "ddp-random",
)
FEW_RUNS = ("single", "single-few", "single-same", "ddp-few")


def say(words: str) -> None:
    """With the time of day and the seconds since the start."""
    print(f"[{time.strftime('%H:%M:%S')} +{time.monotonic() - BEGAN:.0f} s] {words}", flush=True)


def main() -> int:
    """Build, run what is asked for, print; 1 when a run failed or differs from `single`."""
    options = parse()
    # Ended by a time limit, this must not leave ranks behind, and still say what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    os.environ |= {
        "NCCL_NVLS_ENABLE": "0",
        "SAMESTEP_CACHE": str(options.folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    known = runs_of(options.gpus, options.steps, options.per_gpu or FEW)
    asked = [name for name in options.runs.split(",") if name]
    if wrong := [name for name in asked if name not in known]:
        raise SystemExit(f"--runs: there is no {', '.join(wrong)}; choose of {', '.join(known)}")
    results = read_results(options)
    if options.fresh:
        results = {name: each for name, each in results.items() if name not in asked}
    try:
        build(options)
        for name in asked:
            if not options.cuda and known[name].strategy == "fsdp":
                say(f"{name}: left out, fsdp needs GPUs")
            elif name in results and results[name].outcome == "DONE":
                say(f"{name}: is in {options.output}, not run again")
            elif options.budget and time.monotonic() - BEGAN > options.budget:
                say(f"{name}: not begun, {options.budget:.0f} s are over")
            else:
                launch(options, known[name], results)
    finally:
        report(asked_for(options), [results[name] for name in known if name in results])
    measured = list(results.values())
    problems = {
        name: found
        for name in asked
        if name in results and (found := judge(results[name], like_for_like(results[name], measured)))
    }
    for name, found in problems.items():
        print(f"{name}: {'; '.join(found)}", file=sys.stderr)
    return 1 if problems else 0


def parse() -> argparse.Namespace:
    """The command line; `cuda`: whether there are GPUs."""
    import torch

    present = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=present or 2, help="(default: all, 2 processes on a CPU)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (default: 20)")
    parser.add_argument("--shape", choices=["7b", "tiny"], default="7b", help="of the base (default: 7b)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="for weights, charts and runs"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON of what is done (default: multi_gpu.json in the folder)"
    )
    parser.add_argument(
        "--runs",
        help=f"of {', '.join(runs_of(2, 20))} (default: {', '.join(DEFAULT_RUNS)}; on one GPU or with --per-gpu: "
        f"{', '.join(FEW_RUNS)})",
    )
    parser.add_argument(
        "--per-gpu", type=int, metavar="SAMPLES", help=f"of each GPU in the `few` runs (default: {FEW})"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe value")
    parser.add_argument("--limit", type=float, default=400, help="seconds of one run (default: 400)")
    parser.add_argument(
        "--budget", type=float, help="begin no run after this many seconds, print what there is"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="run again what is asked for, after a change of the code"
    )
    options = parser.parse_args()
    options.cuda = present > 0
    options.folder = options.folder.absolute()
    options.output = options.output or options.folder / "multi_gpu.json"
    if options.cuda and options.gpus > present:
        parser.error(f"--gpus: {present} are there")
    if options.per_gpu is not None and options.per_gpu < 1:
        parser.error(f"--per-gpu: {options.per_gpu} is no number of samples above 0")
    options.runs = options.runs or ",".join(default_runs(options.gpus, options.per_gpu))
    return options


def default_runs(gpus: int, per_gpu: int | None) -> list[str]:
    """What is run when nothing is named. On one GPU that is the host's share: few samples a step against many."""
    chosen = FEW_RUNS if per_gpu or gpus == 1 else DEFAULT_RUNS
    return [name for name in chosen if gpus > 1 or name in ("single", "single-few")]


def build(options: argparse.Namespace) -> None:
    """Weights, charts and their index, unless they are there; in processes of their own, so that GPU 0 stays empty."""
    shared = ["--folder", str(options.folder), "--shape", options.shape, "--steps", str(options.steps)]
    say(f"building what is missing in {options.folder}")
    environment = child_environment()
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--build-only", *shared]
    subprocess.run(command, env=environment, check=True)
    recipe = str(ROOT / "recipes" / f"{RECIPE}.yaml")
    run = Run("prepare", "single", 1, GLOBAL_BATCH, "balanced", options.steps)
    prepare = [sys.executable, "-m", "trainer.prepare", "--quiet", recipe, *settings(options, run)]
    subprocess.run(prepare, env=environment, cwd=ROOT, check=True)


def settings(options: argparse.Namespace, run: Run) -> list[str]:
    """What a run changes in the default recipe."""
    return recipe_settings(options.folder, run.steps, options.set, batch__global_batch_size=run.global_batch)


def launch(options: argparse.Namespace, run: Run, results: dict[str, Measured]) -> None:
    """One run to its end or to the limit, with a line of progress every few steps; its figures go into `results`."""
    name = f"{run.name}-{run.processes}x-{time.time_ns()}"
    folder, clocks = options.folder / "runs" / name, options.folder / "clocks" / name
    folder.parent.mkdir(exist_ok=True)
    clocks.mkdir(parents=True)
    profiled = PROFILED_STEP if options.cuda and run.steps > PROFILED_STEP else 0
    module = ["benchmarks.measured_train", str(clocks), str(profiled), run.assignment]
    train = [RECIPE, "--runs-dir", str(folder.parent), "--name", name, *settings(options, run)]
    command = launch_command(run.processes, [*module, *train], run.strategy)
    environment = child_environment()
    if run.processes == 1 and options.cuda:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    say(f"{run.name}: {run.strategy} on {run.processes}, {run.steps} steps of {run.global_batch}")
    began = time.monotonic()
    log = options.output.parent / f"{run.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        follow(process, folder / "metrics.jsonl", run, options.limit)
    finally:  # also when this process is ended: what was measured so far is kept
        kill_all(family(process.pid))
        process.wait()
        measured = summarize(
            run.name, run.strategy, run.processes, run.global_batch, run.assignment, folder, clocks, profiled
        )
        results[run.name] = measured
        write_results(options, results)
        say(f"{run.name}: {measured.outcome} in {time.monotonic() - began:.0f} s, {measured.in_short()}")
    if measured.outcome != "DONE":
        print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]), flush=True)


def follow(process: subprocess.Popen[bytes], metrics: Path, run: Run, limit: float) -> None:
    """Until it ended or the limit is over."""
    deadline, told = time.monotonic() + limit, 0
    while process.poll() is None:
        if time.monotonic() > deadline:
            say(f"{run.name}: not done after {limit:.0f} s, ended")
            return
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and len(lines) != told and (len(lines) % 5 == 0 or told == 0):
            told = len(lines)
            last = json.loads(lines[-1])
            say(
                f"{run.name}: step {last['step']} of {run.steps}, loss {last['loss']:.4f}, {last['seconds']:.2f} s"
            )
        time.sleep(0.2)


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """What results must share to be compared."""
    return {
        "gpus": options.gpus,
        "per_gpu": options.per_gpu or FEW,
        "steps": options.steps,
        "shape": options.shape,
        "set": options.set,
    }


def read_results(options: argparse.Namespace) -> dict[str, Measured]:
    """Of earlier calls with the same settings."""
    if not options.output.is_file():
        return {}
    known = json.loads(options.output.read_text())
    if known["asked"] != asked_for(options):
        say(f"{options.output}: is of other settings ({known['asked']}), begun anew")
        return {}
    return {entry["name"]: Measured(**entry) for entry in known["runs"]}


def write_results(options: argparse.Namespace, results: dict[str, Measured]) -> None:
    """Whole or not at all."""
    text = json.dumps(
        {"asked": asked_for(options), "runs": [asdict(each) for each in results.values()]}, indent=1
    )
    aside = options.output.with_suffix(".partial")
    aside.write_text(text)
    aside.replace(options.output)


if __name__ == "__main__":
    sys.exit(main())
