"""The run's figures on disk: `metrics.jsonl`, one line per optimizer step, and `evaluations.jsonl`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write, naming, sync
from launch.untrusted_files import TABLE, parse_json, read_text


def samples_digest(samples: Iterable[int]) -> str:
    """sha256 (hex, 16 digits) of the sorted sample ids of a step: equal for every layout of the same run."""
    return hashlib.sha256(json.dumps(sorted(int(sample) for sample in samples)).encode()).hexdigest()[:16]


def append_line(file: Path, values: Mapping[str, Any]) -> None:
    """Add one JSON line."""
    with naming(file), file.open("a") as handle:
        handle.write(json.dumps(values) + "\n")


def keep_lines_until(file: Path, step: int) -> None:
    """Remove the lines of later steps, which a resumed run takes again, and a line that a kill cut short."""
    if not file.exists():
        return
    kept = [
        line
        for line in read_text(file, TABLE).splitlines()
        if (parsed := _parse(line)) and parsed["step"] <= step
    ]
    atomic_write(file, "".join(f"{line}\n" for line in kept))


def bring_to_disk(file: Path) -> None:
    """Before a checkpoint is published: a power cut must not take the figures of the steps that it keeps."""
    if file.exists():
        with naming(file):
            sync(file)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return parsed


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All lines, oldest first."""
    return [parse_json(line) for line in read_text(file, TABLE).splitlines()] if file.exists() else []
