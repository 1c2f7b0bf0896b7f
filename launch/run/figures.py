"""The figures of a run as they stand in its folder: one mapping a step, from `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.untrusted_files import TABLE, UNREADABLE, parse_json, read_text, reason_of

MOST_BYTES = 16 * TABLE  # of the figures: ten million steps


def read_steps(file: Path) -> dict[int, dict[str, Any]]:
    """Step -> its figures. The last line of a file may be half written: a run may be under way.

    Raises:
        ConfigError: the file is missing, or another line of it is none of ours.
    """
    try:
        lines = read_text(file, MOST_BYTES).splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{file}: is missing; the run has taken no step yet") from None
    except UNREADABLE as error:
        raise ConfigError(f"{file}: cannot be read ({reason_of(error)})") from None
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
            step = values["step"]
        except (ValueError, LookupError, TypeError):
            step = None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 1:
            steps[step] = values
        elif number < len(lines):
            raise ConfigError(
                f"{file}: line {number} holds no figures of a step; the run's next resume removes it"
            )
    return steps


def number_of(figures: dict[str, Any], name: str) -> float | None:
    """One figure of a step; None where it is absent or no number."""
    value = figures.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
