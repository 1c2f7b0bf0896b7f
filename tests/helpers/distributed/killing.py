"""`kill -9` at chosen moments: of one rank, of all, of the launcher; between two steps, or inside a save."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from benchmarks.launching import family, kill_all, launch_command
from tests.helpers.distributed.launching import published_steps, started, wait_until, workers

Victim = Literal["rank", "all", "launcher"]


@dataclass(frozen=True)
class Hit:
    """One kill: `after` steps beyond the newest checkpoint, inside a save or wherever that finds the run."""

    victim: Victim
    in_save: bool
    after: int


@dataclass(frozen=True)
class Outcome:
    """What a hit left behind: the newest published step, and folders that were never published."""

    hit: Hit
    newest: int
    unpublished: tuple[str, ...]


def choose_hits(count: int, in_saves: int, seed: int) -> list[Hit]:
    """`count` hits, the victims in turn; `in_saves` of them inside a save, which only rank 0's death interrupts."""
    draw = random.Random(seed)
    victims: list[Victim] = ["all", "rank", "launcher"]
    hits = [Hit(victims[place % 3], False, draw.randint(1, 3)) for place in range(count - in_saves)]
    hits += [Hit("all" if place % 2 else "rank", True, draw.randint(1, 3)) for place in range(in_saves)]
    draw.shuffle(hits)
    return hits


def survive(
    arguments: Sequence[str],
    run: Path,
    processes: int,
    hits: Sequence[Hit],
    log: Path,
    strategy: str | None = None,
) -> list[Outcome]:
    """Start the run again and again, with each hit in turn; then let it end. Fails the test when it does not."""
    draw = random.Random(len(hits))
    command = launch_command(processes, arguments, strategy)
    outcomes = [_strike(command, run, processes, hit, log, draw) for hit in hits]
    with started(command, log) as process:
        status = process.wait(timeout=600)
    assert status == 0, log.read_text()
    return outcomes


def _strike(
    command: Sequence[str], run: Path, processes: int, hit: Hit, log: Path, draw: random.Random
) -> Outcome:
    target = max(published_steps(run), default=0) + hit.after
    with started(command, log) as process:

        def reached() -> bool:
            assert process.poll() is None, f"ended before it could be killed:\n{log.read_text()}"
            return max(published_steps(run), default=0) >= target

        wait_until(reached)
        ranks = workers(process.pid)
        everybody = family(process.pid)
        assert len(ranks) == processes
        if hit.in_save:
            wait_until(lambda: reached() and any(run.glob("checkpoint-*.partial")), pause=0)
        _kill(hit, process.pid, ranks, everybody, draw)
        _, alive = psutil.wait_procs(everybody, timeout=90)
        assert not alive, f"{hit} left {alive}:\n{log.read_text()}"
    unpublished = tuple(sorted(folder.name for folder in run.glob("checkpoint-*.partial")))
    return Outcome(hit, max(published_steps(run), default=0), unpublished)


def _kill(
    hit: Hit,
    launcher: int,
    ranks: Sequence[psutil.Process],
    everybody: list[psutil.Process],
    draw: random.Random,
) -> None:
    if hit.victim == "all":
        kill_all(sorted(everybody, key=lambda member: member.pid not in {rank.pid for rank in ranks}))
    elif hit.victim == "rank":
        victim = ranks[0] if hit.in_save else draw.choice(ranks)
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    else:
        psutil.Process(launcher).send_signal(signal.SIGKILL)
