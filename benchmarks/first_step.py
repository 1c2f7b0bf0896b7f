"""Time to the first step of `samestep run`, by its parts: several starts of the default recipe on random weights.

    python benchmarks/first_step.py                            # the 7B shape, one GPU
    python benchmarks/first_step.py --shape tiny --starts 5    # anywhere: all but the base and the kernels
    python benchmarks/first_step.py --cold                     # the base's files are not in the system's cache
    python benchmarks/first_step.py --new-kernels              # Triton finds none of its kernels in its cache

A start is a fresh run of one step. `command` is the time until `samestep run` starts the launcher, the other parts are
what the trainer kept in `environment.json`; `cpu` are the processor's seconds of all processes, whatever else the
machine does. Prints a line a start, the medians, and one JSON line. Weights and charts are those of `throughput.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.random_base import RECIPE, build, recipe_settings

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Build, start, print."""
    options = parse()
    os.environ["SAMESTEP_CACHE"] = str(options.folder / "cache")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    build(options)
    settings = recipe_settings(options.folder, 1, options.set)
    subprocess.run([sys.executable, "-m", "launch.cli.main", "prepare", RECIPE, *settings], check=True)
    starts = []
    for _ in range(options.starts):
        starts.append(start(options, settings))
        print(json.dumps(starts[-1]), flush=True)
    parts = list(dict.fromkeys(part for each in starts for part in each))
    medians = {part: round(statistics.median(each.get(part, 0.0) for each in starts), 2) for part in parts}
    print(json.dumps({"shape": options.shape, "cold": options.cold, "medians": medians, "starts": starts}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["7b", "tiny"], default="7b", help="of the base (default: 7b)")
    parser.add_argument("--starts", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/samestep-benchmark"), help="weights, charts, runs"
    )
    parser.add_argument(
        "--cold", action="store_true", help="drop the base from the system's cache before each start"
    )
    parser.add_argument("--new-kernels", action="store_true", help="an empty Triton cache for each start")
    parser.add_argument("--strategy", default="single", help="default: single")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe value")
    options = parser.parse_args()
    options.folder, options.steps = options.folder.absolute(), 20
    return options


def start(options: argparse.Namespace, settings: list[str]) -> dict[str, float]:
    """Seconds of one start's parts."""
    if options.cold:
        drop_from_cache(options.folder / "base")
    with tempfile.TemporaryDirectory() as kernels:
        environment = {**os.environ, **({"TRITON_CACHE_DIR": kernels} if options.new_kernels else {})}
        command = [sys.executable, "-m", "launch.cli.main", "run", RECIPE, *settings]
        command += [
            "--strategy",
            options.strategy,
            "--name",
            "start",
            "--runs-dir",
            str(options.folder / "runs"),
        ]
        began, spent = time.time(), cpu_seconds()
        ended = subprocess.run(
            [*command, "--fresh"], env=environment, capture_output=True, text=True, check=False
        )
    if ended.returncode:
        raise SystemExit(ended.stdout + ended.stderr)
    file = options.folder / "runs" / "start" / "environment.json"
    found: dict[str, Any] = json.loads(file.read_text())["first_step"]
    total = file.stat().st_mtime - began  # it was written again at the end of the first step
    parts = {part: seconds for part, seconds in found.items() if part != "total"}
    command_s = total - found["total"]
    return {
        "total": round(total, 2),
        "cpu": round(cpu_seconds() - spent, 2),
        "command": round(command_s, 2),
        **parts,
    }


def drop_from_cache(folder: Path) -> None:
    """Let the system forget what it has read of a folder's files."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_seconds() -> float:
    """Of all children that have ended, their own children's included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
