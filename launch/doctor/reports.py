"""What the nodes of a job have printed (`launch.doctor.on_node`, through `srun --label`): findings, and a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from launch.console import add_row
from launch.doctor.finding import Finding, from_json
from launch.untrusted_files import parse_json, printable

_LABELLED = re.compile(r"\s*(\d+): (.*)")
_OF_ALL_NODES = (
    "libraries",
    "base model",
    "data",
    "runs folder",
    "locks",
)  # where one node is all that is known
_NEEDS_HEAD = ("meeting",)  # fails on every node when the first one is not there


def findings_of_nodes(printed: str, names: Sequence[str]) -> list[Finding]:
    """All findings; `names`: of the job's nodes, in the order of its tasks. A node that did not end is one more."""
    findings: list[Finding] = []
    ended: set[str] = set()
    last_words = dict.fromkeys(names, "")
    for line in printed.splitlines():
        match = _LABELLED.fullmatch(line)
        node = names[int(match[1])] if match and int(match[1]) < len(names) else ""
        text = match[2] if match and node else line
        if node and text.startswith("{"):
            finding, end = _read(text, node)
            findings += [finding] if finding else []
            ended |= {node} if end else set()
        elif text.strip():
            for name in (
                [node] if node else [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
            ):
                last_words[name] = text.strip()
    silent = [name for name in names if name not in ended]
    if names and names[0] in silent:
        findings = [
            replace(one, state="not checked", remedy="") if one.check in _NEEDS_HEAD else one
            for one in findings
        ]
    return findings + [_silent(name, findings, last_words[name]) for name in silent]


def _read(text: str, node: str) -> tuple[Finding | None, bool]:
    try:
        values = parse_json(text)
    except ValueError:
        return None, False
    if not isinstance(values, dict):
        return None, False
    return from_json(values, node), values.get("end") is True


def _silent(name: str, findings: Sequence[Finding], words: str) -> Finding:
    last = next((one.check for one in reversed(findings) if one.node == name), None)
    said = f" ({printable(words)[:300]})" if words else ""
    text = f"did not answer{said}" if last is None else f"fell silent after {last!r}{said}"
    remedy = "is it up (`scontrol show node`), and are the shared disk and its Python there? else choose another node"
    return Finding("answer", "failed", text, remedy, name)


def unfit_nodes(findings: Sequence[Finding]) -> list[str]:
    """The nodes with a failure, sorted."""
    return sorted({finding.node for finding in findings if finding.state == "failed"})


def failures_of_all(findings: Sequence[Finding], nodes: int) -> list[Finding]:
    """The failures that other nodes would not mend: of every node, or of what all nodes share."""
    failed = [finding for finding in findings if finding.state == "failed"]
    where = {one.check: {other.node for other in failed if other.check == one.check} for one in failed}
    return [
        one for one in failed if (len(where[one.check]) == nodes if nodes > 1 else one.check in _OF_ALL_NODES)
    ]


def short_reason(findings: Sequence[Finding]) -> str:
    """The failures in a line: `n2: scratch: 0.0 GiB free; n3: clock: ...`."""
    failed = [finding for finding in findings if finding.state == "failed"]
    return "; ".join(f"{one.node}: {one.check}: {one.text}" for one in failed[:8])


def print_nodes(console: Console, findings: Sequence[Finding], names: Sequence[str]) -> None:
    """One table: what is right once for all nodes, what is not for each node."""
    table = Table("node", "check", "state", "what was seen", "what to do")
    for row in _rows(findings, len(names)):
        add_row(table, row.node, row.check, row.state, row.text, row.remedy)
    console.print(table)


def _rows(findings: Sequence[Finding], nodes: int) -> Iterator[Finding]:
    for check in dict.fromkeys(finding.check for finding in findings):
        same = [finding for finding in findings if finding.check == check]
        good = [finding for finding in same if finding.state == "ok"]
        if good:
            which = "all" if len({one.node for one in good}) == nodes else ", ".join(one.node for one in good)
            texts = {one.text for one in good}
            text = good[0].text if len(texts) == 1 else f"{good[0].node}: {good[0].text}"
            yield replace(good[0], node=which, text=text)
        yield from (finding for finding in same if finding.state != "ok")
