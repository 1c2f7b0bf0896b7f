"""What one check of a machine has shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

State = Literal["ok", "warning", "failed", "not checked"]


@dataclass(frozen=True)
class Finding:
    """`text`: the figures; `remedy`: what to do about a warning or a failure, empty otherwise; `node`: of a job."""

    check: str
    state: State
    text: str
    remedy: str = ""
    node: str = ""


def verdict(findings: Iterable[Finding]) -> str:
    """In one line: whether a run can start here."""
    states = [finding.state for finding in findings]
    failed, warnings = states.count("failed"), states.count("warning")
    if failed:
        return f"not ready: {failed} failed, {warnings} warning{'' if warnings == 1 else 's'}"
    return f"ready{f', with {warnings} warning' + ('' if warnings == 1 else 's') if warnings else ''}"


def to_json(findings: Iterable[Finding]) -> str:
    """A list of findings; of one machine they name no node."""
    shown = [asdict(finding) for finding in findings]
    return json.dumps(
        [{key: value for key, value in one.items() if key != "node" or value} for one in shown], indent=1
    )


def from_json(values: dict[str, Any], node: str) -> Finding | None:
    """A finding of another process about `node`; None for what is none."""
    words = [values.get(key, "") for key in ("check", "state", "text", "remedy")]
    if not all(isinstance(word, str) for word in words) or words[1] not in get_args(State):
        return None
    check, state, text, remedy = words
    return Finding(check, state, text, remedy, node)
