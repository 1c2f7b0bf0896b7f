"""Time to the first step of `samestep run`, by its parts: several starts of the default recipe on random weights.

    python benchmarks/first_step.py                            # the 7B shape, one GPU
    python benchmarks/first_step.py --shape tiny --starts 5    # anywhere: all but the base and the kernels
    python benchmarks/first_step.py --cold                     # the base's files are not in the system's cache
    python benchmarks/first_step.py --new-kernels              # Triton finds none of its kernels in its cache

A start is a fresh run, ended after its first step. `command` is the time until `samestep run` starts the launcher, the
other parts are what the trainer kept in `environment.json`; `cpu` are the seconds of all processes, whatever
else the machine does. Prints a line a start, the medians, and one JSON line. Weights and charts are those of
`throughput.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launching import family, kill_all
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
        began = time.time()
        process = subprocess.Popen(
            [*command, "--fresh"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        recorded, written_at, cpu = wait_for_first_step(process, options.folder / "runs" / "start", began)
    total = written_at - began
    parts = {part: seconds for part, seconds in recorded.items() if part != "total"}
    command_s = total - recorded["total"]
    return {
        "total": round(total, 2),
        "cpu": round(cpu, 2),
        "command": round(command_s, 2),
        **parts,
    }


def wait_for_first_step(
    process: subprocess.Popen[str], run: Path, began: float
) -> tuple[dict[str, Any], float, float]:
    """Wait for a run's first step, and end the run.

    Returns the parts of the time, when they were written (seconds since 1970), and the processor's seconds.
    """
    file, errors = run / "environment.json", list[str]()
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    while process.poll() is None:
        with suppress(OSError, ValueError):
            if file.stat().st_mtime >= began and (parts := json.loads(file.read_text()).get("first_step")):
                written_at, cpu = file.stat().st_mtime, cpu_seconds(process.pid)
                kill_all(family(process.pid))
                process.wait()
                return parts, written_at, cpu
        time.sleep(0.05)
    reader.join()
    raise SystemExit("".join(errors))


def drop_from_cache(folder: Path) -> None:
    """Let the system forget what it has read of a folder's files."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_seconds(pid: int) -> float:
    """Of a process and all its descendants, those that have ended included."""
    total = 0.0
    for process in family(pid):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


if __name__ == "__main__":
    main()
