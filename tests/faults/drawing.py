"""Which faults meet a chain of attempts at one run: chosen by a seed alone, before anything is started."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Phase = Literal["start", "importing", "meeting", "steps", "save", "between"]
"""While the victim starts, while the ranks import, while they look for each other, between steps, inside a save; or
while nothing runs."""


@dataclass(frozen=True)
class Layout:
    """A strategy and how many processes."""

    strategy: str
    processes: int

    def __str__(self) -> str:
        return f"{self.strategy} x {self.processes}"


LAYOUTS = (
    Layout("single", 1),
    Layout("ddp", 2),
    Layout("ddp", 3),
    Layout("zero2", 2),
    Layout("zero3", 2),
    Layout("zero3", 1),
)
"""FSDP is not among them: accelerate knows none on CPUs, and a shim would stand between the user and the product."""

VICTIMS = ("rank", "launcher", "top")
DAMAGES = (
    "newest checkpoint: a file cut",
    "newest checkpoint: a byte flipped",
    "newest checkpoint: a file missing",
    "newest checkpoint: manifest missing",
    "newest checkpoint: manifest cut",
    "newest checkpoint: a foreign file",
    "metrics.jsonl: half a line at its end",
    "evaluations.jsonl: half a line at its end",
    "marker: random bytes",
    "marker: DONE of a step not taken",
    "plan.json: cut",
    "plan.json: missing",
    "environment.json: missing",
    "an unpublished checkpoint left",
    "STOP left",
    "SAVE left",
    "lock: random bytes",
    "prepared index: missing",
    "prepared index: a byte flipped",
    "prepared index: cut",
)


@dataclass(frozen=True)
class Fault:
    """One fault. `action` and `target` name it; the numbers say when and where, as shares from 0 to 1.

    `seconds`: after the birth of the victim (`start`) or of the ranks (`importing`), or how long a stopped process
    stays so; `ahead`: steps beyond where the attempt went on.
    """

    action: str
    target: str
    phase: Phase
    seconds: float
    ahead: int
    share: float

    @property
    def kind(self) -> str:
        """Its row in the table."""
        return f"{self.action} {self.target}".strip()

    def __str__(self) -> str:
        when = {
            "start": f"{self.seconds:.1f} s after its start",
            "importing": f"{self.seconds:.1f} s after the ranks' start",
            "meeting": "while the processes meet",
            "steps": f"{self.ahead} steps on",
            "save": "inside a save",
            "between": "",
        }[self.phase]
        return f"{self.kind} ({when})" if when else self.kind


@dataclass(frozen=True)
class Chain:
    """A run that is begun in a layout and meets its faults one after the other."""

    number: int
    layout: Layout
    faults: tuple[Fault, ...]


def draw_chain(seed: int, number: int) -> Chain:
    """The chain of that number: 3 to 6 faults. Depends on the two numbers and on nothing else."""
    draw = random.Random(f"{seed}/{number}")
    layout = draw.choices(LAYOUTS, (4, 4, 2, 2, 2, 1))[0]
    return Chain(number, layout, tuple(_draw_fault(draw) for _ in range(draw.randint(3, 6))))


def _draw_fault(draw: random.Random) -> Fault:
    action = draw.choices(tuple(_DRAWN), tuple(weight for weight, _, _ in _DRAWN.values()))[0]
    _, targets, phases = _DRAWN[action]
    phase = draw.choice(phases)
    longest = 3.0 if phase in ("meeting", "steps", "save") else 4.0
    seconds = round(draw.uniform(0.1, longest), 1)
    return Fault(action, draw.choice(targets), phase, seconds, draw.randint(1, 5), draw.random())


_RUNNING: tuple[Phase, ...] = ("start", "importing", "meeting", "steps", "steps", "save")
_NOTHING_RUNS: tuple[Phase, ...] = ("between",)
_DRAWN: dict[str, tuple[int, tuple[str, ...], tuple[Phase, ...]]] = {
    "kill -9 of": (24, ("rank", "launcher", "top", "all", "data worker"), _RUNNING),
    "SIGTERM to": (7, VICTIMS, _RUNNING),
    "SIGINT to": (7, VICTIMS, _RUNNING),
    "SIGHUP to": (5, VICTIMS, _RUNNING),
    "SIGSTOP and SIGCONT of": (6, VICTIMS, _RUNNING),
    "SIGSTOP and kill -9 of": (6, VICTIMS, _RUNNING),
    "full disk": (6, ("",), ("start", "importing", "steps", "save")),
    "files of at most 20 kB": (3, ("",), _NOTHING_RUNS),
    "damaged or missing,": (20, DAMAGES, _NOTHING_RUNS),
    "environment of another launcher": (4, ("",), _NOTHING_RUNS),
    "/dev/shm of 1 MB": (4, ("",), _NOTHING_RUNS),
    "move": (8, tuple(map(str, LAYOUTS)), _NOTHING_RUNS),
}
"""Action -> its weight, its targets, its phases."""
