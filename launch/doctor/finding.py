"""What one check of a machine has shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["ok", "warning", "failed", "not checked"]


@dataclass(frozen=True)
class Finding:
    """`text`: the figures; `remedy`: what to do about a warning or a failure, empty otherwise."""

    check: str
    state: State
    text: str
    remedy: str = ""


def verdict(findings: Iterable[Finding]) -> str:
    """In one line: whether a run can start here."""
    states = [finding.state for finding in findings]
    failed, warnings = states.count("failed"), states.count("warning")
    if failed:
        return f"not ready: {failed} failed, {warnings} warning{'' if warnings == 1 else 's'}"
    return f"ready{f', with {warnings} warning' + ('' if warnings == 1 else 's') if warnings else ''}"


def to_json(findings: Iterable[Finding]) -> str:
    """A list of findings."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)
