"""What became of faults and chains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Seconds: from a fault to the end of all processes; from a start to its first step."""

    end: float = 60
    start: float = 120


@dataclass
class Outcome:
    """What became of one fault. `trouble`: hung, by hand or lost, and how that was seen; empty: survived.

    `ended`: seconds until all processes had ended, None where they were to go on; `went_on`: seconds from the start
    of the next attempt to its first step, None where the same attempt went on.
    """

    fault: str
    kind: str
    ended: float | None = None
    went_on: float | None = None
    trouble: str = ""


@dataclass
class Result:
    """A chain that is over. `verdict`: how its run compares with the undisturbed one; `lost`: it is another run."""

    number: int
    layout: str
    outcomes: list[Outcome] = field(default_factory=list)
    verdict: str = ""
    lost: bool = False
    seconds: float = 0.0
    missed: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of_json(values: dict[str, Any]) -> Result:
        outcomes = [Outcome(**outcome) for outcome in values.pop("outcomes")]
        return Result(outcomes=outcomes, **values)
