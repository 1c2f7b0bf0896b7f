"""The run's figures on disk: `metrics.jsonl`, one line per optimizer step, and `evaluations.jsonl`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write, naming, sync
from launch.untrusted_files import TABLE, parse_json, read_bytes, read_text

_MOST = 16 * TABLE  # bytes of the figures: ten million steps


def samples_digest(samples: Iterable[int]) -> str:
    """sha256 (hex, 16 digits) of the sorted positions of a step's samples: what runs of older versions go on with."""
    return hashlib.sha256(json.dumps(sorted(int(sample) for sample in samples)).encode()).hexdigest()[:16]


def step_rows_digest(rows: Iterable[bytes]) -> str:
    """sha256 (hex, 16 digits) of the sorted content digests of a step's rows: equal for every layout of a run.

    It names what was seen, wherever it stands in the split.
    """
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()[:16]


def append_line(file: Path, values: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with naming(file), file.open("a") as handle:
        handle.write(json.dumps(values) + "\n")


@dataclass(frozen=True)
class KeptLines:
    """What a file of figures has after a resume: its `steps`, in their order, and those that were there `doubled`."""

    file: Path
    steps: tuple[int, ...] = ()
    doubled: tuple[int, ...] = ()

    def flaws(self, expected: Iterable[int] = ()) -> Iterator[str]:
        """Describe what is not as promised, one line each."""
        if self.doubled:
            yield f"{self.file}: had more than one line of {numbers(self.doubled)}; the last of each is kept"
        if lost := sorted({*expected} - {*self.steps}):
            yield (
                f"{self.file}: has no whole line of {numbers(lost)} (lost or damaged: {len(lost)}); the run goes on, "
                "its checkpoints are not touched by that"
            )


def numbers(steps: Sequence[int]) -> str:
    """`step 3`, `steps 3, 5-7`."""
    ranges: list[list[int]] = []
    for step in sorted({*steps}):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)
    return f"step{'s' if len({*steps}) > 1 else ''} {shown}"


def keep_lines_until(file: Path, step: int) -> KeptLines:
    """Remove the lines of later steps, which a resumed run takes again, second lines of a step, and what is no line."""
    if not file.exists():
        return KeptLines(file)
    lines: dict[int, str] = {}
    doubled = []
    for line in read_bytes(file, _MOST).decode(errors="replace").splitlines():
        parsed = _step_of(line)
        if parsed is None or parsed > step:
            continue
        if parsed in lines:
            doubled.append(parsed)
        lines[parsed] = line
    atomic_write(file, "".join(f"{line}\n" for line in lines.values()))
    return KeptLines(file, tuple(lines), tuple(doubled))


def sync_to_disk(file: Path) -> None:
    """Before a checkpoint is published: a power cut must not take the figures of the steps that it keeps."""
    if file.exists():
        with naming(file):
            sync(file)


def _step_of(line: str) -> int | None:
    """Return the step of a whole line; None for anything else."""
    try:
        parsed = json.loads(line)
        step = parsed["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return all lines, oldest first."""
    return [parse_json(line) for line in read_text(file, _MOST).splitlines()] if file.exists() else []
