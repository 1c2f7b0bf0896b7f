"""The fault campaign: chains of random faults until so many were suffered, and the table of what became of them.

python -m tests.faults.campaign --seed 1 --faults 100     (`make test-faults SEED=1 FAULTS=100`)

What is done is kept below runs/faults, so that a campaign that is interrupted goes on with the same command. Needs
root: it mounts small disks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

from benchmarks.launching import ROOT
from tests.conftest import write_world
from tests.faults.attempt import run_command, run_environment
from tests.faults.chain import EVERY, STEPS, Place, play
from tests.faults.drawing import LAYOUTS, draw_chain
from tests.faults.outcomes import Limits, Result
from tests.faults.table import write_table
from tests.helpers.distributed.recorded import apart, write_recipe
from tests.long.results import commit

TABLE = Path(__file__).with_name("RESULTS.md")
BESIDE = 2
"""Chains at a time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 when every fault was survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the choice of faults (default: 1)")
    parser.add_argument("--faults", type=int, default=100, help="how many to suffer (default: 100)")
    parser.add_argument("--chain", type=int, help="play this chain alone, and write no table")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        sys.stderr.write("test-faults: needs root, to mount small disks\n")
        return 2
    if options.chain is not None:
        result = play(draw_chain(options.seed, options.chain), prepare(options.seed), Limits(), Event())
        _tell(result)
        return int(bool(troubles([result])))
    results = campaign(options.seed, options.faults)
    return int(bool(troubles(results)))


def campaign(seed: int, faults: int) -> list[Result]:
    """Play chains until `faults` were suffered, and write the table after each. Returns them by number."""
    place = prepare(seed)
    results = {result.number: result for result in map(_read, sorted(place.folder.glob("chain-*.json")))}
    stop = Event()
    with ThreadPoolExecutor(BESIDE) as pool:
        under_way: dict[Future[Result], int] = {}
        try:
            while under_way or _count(results) < faults:
                while len(under_way) < BESIDE and _count(results) < faults:
                    number = _next({*results, *under_way.values()})
                    chain = draw_chain(seed, number)
                    under_way[pool.submit(play, chain, place, Limits(), stop)] = number
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    result = results[under_way.pop(future)] = future.result()
                    _keep(place, result)
                    _tell(result)
                    write_table(TABLE, seed, [results[number] for number in sorted(results)])
        finally:
            stop.set()  # chains under way leave no process behind
    ordered = [results[number] for number in sorted(results)]
    write_table(TABLE, seed, ordered)
    return ordered


def troubles(results: Sequence[Result]) -> list[str]:
    """What was not survived, a line each."""
    found = [
        f"chain {result.number}: {outcome.fault}: {outcome.trouble}"
        for result in results
        for outcome in result.outcomes
        if outcome.trouble
    ]
    return found + [f"chain {result.number}: {result.verdict}" for result in results if result.lost]


def prepare(seed: int) -> Place:
    """The world, its undisturbed runs, and what an interrupted campaign of this seed and commit has left."""
    folder = ROOT / "runs" / "faults" / f"seed-{seed}"
    _unmount(folder)
    of_commit = folder / "commit"
    here = commit()
    if not of_commit.is_file() or of_commit.read_text() != here:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder, folder / "recipe.yaml", folder / "cache")
    if not of_commit.is_file():
        write_world(folder)
        write_recipe(
            folder,
            place.recipe,
            "nf4",
            training={"max_steps": STEPS, "dataloader_num_workers": 1},
            checkpoint={"every_steps": EVERY},
            evaluation={"every_steps": 20},
        )
        for layout in LAYOUTS:
            _run_straight(place, layout.strategy, layout.processes)
            loss, weights = apart(place.straight(layout), place.straight(LAYOUTS[0]))
            say(
                f"undisturbed, {layout}: losses within {loss:.1e}, adapter within {weights:.1e} of {LAYOUTS[0]}"
            )
        of_commit.write_text(here)
    return place


def say(text: str) -> None:
    """To whoever watches."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def _run_straight(place: Place, strategy: str, processes: int) -> None:
    runs = place.folder / "straight"
    command = run_command(place.recipe, runs, f"{strategy}-{processes}", strategy, processes)
    done = subprocess.run(
        command, env=run_environment(place.cache), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command}: failed undisturbed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _unmount(folder: Path) -> None:
    """Disks of a campaign that was killed."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for path in mounted:
        if Path(path).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", path], check=True)


def _next(taken: set[int]) -> int:
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _count(results: dict[int, Result]) -> int:
    return sum(len(result.outcomes) for result in results.values())


def _keep(place: Place, result: Result) -> None:
    file = place.folder / f"chain-{result.number:03d}.json"
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(result.to_json(), indent=1))
    draft.replace(file)


def _read(file: Path) -> Result:
    return Result.of_json(json.loads(file.read_text()))


def _tell(result: Result) -> None:
    say(f"chain {result.number} ({result.layout}), {result.seconds:.0f} s: {result.verdict}")
    for outcome in result.outcomes:
        times = [f"all ended after {outcome.ended:.1f} s"] if outcome.ended is not None else []
        times += [f"went on after {outcome.went_on:.1f} s"] if outcome.went_on is not None else []
        say(f"    {outcome.fault}: {outcome.trouble or 'survived'} ({', '.join(times)})")


if __name__ == "__main__":
    sys.exit(main())
