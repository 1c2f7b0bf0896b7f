"""What `samestep blame` keeps in a run's folder: the samples of a step, ranked by their share of its loss."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launch.run.directory import RunDirectory
from launch.untrusted_files import UNREADABLE, read_mapping

FOLDER = "blame"
CHANGED_LATER = (
    "the run took this step before a change that was allowed; here it is computed with the new value, so not all of a "
    "difference is due to the samples"
)
"""What to say of a step with `changed`."""
_FILE = re.compile(r"step-([1-9][0-9]{0,9})\.json")


@dataclass(frozen=True)
class BlamedSample:
    """One sample of a step. `loss`: per target token of its own; `share`: what it adds to the step's loss."""

    row: int
    loss: float
    share: float
    target_tokens: int
    tokens: int
    question: str
    target: str


@dataclass(frozen=True)
class BlamedStep:
    """A step as it was kept. `agrees`: its loss came out as the run had recorded it; `changed`: see `CHANGED_LATER`."""

    step: int
    checkpoint: str
    loss: float
    agrees: bool
    samples: tuple[BlamedSample, ...]
    without: tuple[int, ...]
    changes: tuple[tuple[int, str, float, float], ...]
    """(step, figure, as recorded, without the rows)."""
    changed: tuple[str, ...]


def blame_file(run: RunDirectory, step: int) -> Path:
    """Where the samples of a step are kept."""
    return run.path / FOLDER / f"step-{step}.json"


def read_blamed(run: RunDirectory, problems: list[str]) -> list[BlamedStep]:
    """Every step that was looked into, in order; what cannot be read is a line in `problems`."""
    steps = []
    for file in sorted((run.path / FOLDER).glob("step-*.json")):
        if not _FILE.fullmatch(file.name):
            continue
        try:
            steps.append(_parse(read_mapping(file)))
        except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
            problems.append(f"{FOLDER}/{file.name}: cannot be read ({error})")
    return sorted(steps, key=lambda each: each.step)


def _parse(values: dict[str, object]) -> BlamedStep:
    def number(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{value!r:.40} is no number")
        return float(value)

    given = values["samples"]
    if not isinstance(given, list):
        raise TypeError("samples is no list")
    samples = tuple(
        BlamedSample(
            row=int(number(each["row"])),
            loss=number(each["loss"]),
            share=number(each["share"]),
            target_tokens=int(number(each["target_tokens"])),
            tokens=int(number(each["tokens"])),
            question=str(each["question"]),
            target=str(each["target"]),
        )
        for each in given
    )
    without, steps = values.get("without") or [], values.get("steps") or []
    changed = values.get("changed") or []
    if not (isinstance(without, list) and isinstance(steps, list) and isinstance(changed, list)):
        raise TypeError("without, steps, changed are no lists")
    changes = tuple(
        (int(number(each["step"])), str(each["name"]), number(each["recorded"]), number(each["without"]))
        for each in steps
    )
    return BlamedStep(
        int(number(values["step"])),
        str(values["checkpoint"]),
        number(values["loss"]),
        values.get("agrees") is True,
        samples,
        tuple(int(number(row)) for row in without),
        changes,
        tuple(map(str, changed)),
    )
