"""What a run proves of itself, one line a link: data, plan, all steps, adapter, merge, evaluation.

Each line has the digest of its link, and the chain so far: sha256 of the chain before it, the link's name and its
digest. A model card holds the table, so that whoever downloads the folder can hold it against what is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.planning.plan import Plan
from launch.run.directory import RunDirectory
from launch.run.figures import read_steps
from launch.untrusted_files import TABLE, UNREADABLE, parse_json, read_bytes

BEGIN, END = "<!-- proof, checked by `samestep verify` -->", "<!-- end of the proof -->"
_ROW = re.compile(r"\| ([a-z]{1,20}) \| `([0-9a-f]{64})` \| `([0-9a-f]{64})` \| ([^|\n]{0,200}) \|")


@dataclass(frozen=True)
class ProvenLink:
    """One line. `digest`, `chain`: sha256, hexadecimal; `text`: what the digest is of."""

    name: str
    digest: str
    chain: str
    text: str


def chained(digests: Iterable[str]) -> str:
    """sha256 (hex) of the digests of all steps, each hashed together with those before it."""
    chain = b""
    for digest in digests:
        chain = hashlib.sha256(chain + digest.encode()).digest()
    return chain.hex()


def proof_of(
    run: RunDirectory, adapter: str | None, merge: Mapping[str, Any] | None = None
) -> list[ProvenLink]:
    """The links of a run as far as its folder has them. `adapter`: its digest; `merge`: merge.json of a merged model.

    Empty where plan or figures cannot be read, or there is no adapter.
    """
    if adapter is None:
        return []
    try:
        return chain_links(_links(run.plan_file, run.metrics_file, adapter, merge, run.eval_file()))
    except (ConfigError, *UNREADABLE):
        return []


def chain_links(links: Iterable[tuple[str, str, str]]) -> list[ProvenLink]:
    """(name, digest, text) of every link, in order, with the chain up to each."""
    chain, proven = "", []
    for name, digest, text in links:
        chain = hashlib.sha256(f"{chain} {name} {digest}".encode()).hexdigest()
        proven.append(ProvenLink(name, digest, chain, text))
    return proven


def _links(
    plan_file: Path, metrics: Path, adapter: str, merge: Mapping[str, Any] | None, evaluation: Path
) -> Iterator[tuple[str, str, str]]:
    plan = Plan.read(plan_file)
    yield "data", plan.dataset_fingerprint, f"{plan.samples_per_epoch} rows"
    yield "plan", plan_digest(plan_file), f"{plan.max_steps} steps of {plan.global_batch_size} samples"
    yield "steps", *steps_link(metrics)
    yield "adapter", adapter, "its tensors"
    if merge:
        yield (
            "merge",
            merge_digest(merge),
            f"{merge.get('changed')} of {merge.get('tensors')} tensors changed",
        )
    if link := evaluation_link(evaluation, adapter):
        yield "evaluation", *link


def plan_digest(plan_file: Path) -> str:
    """sha256 of plan.json as it lies there: `Plan.digest` counts fields that a later version adds."""
    return hashlib.sha256(read_bytes(plan_file, TABLE)).hexdigest()


def steps_link(metrics: Path) -> tuple[str, str]:
    """(chained digest of the samples of all steps, how many)."""
    steps = read_steps(metrics)
    return chained(
        str(steps[step].get("samples_digest", "")) for step in sorted(steps)
    ), f"{len(steps)} taken"


def merge_digest(record: Mapping[str, Any]) -> str:
    """sha256 of what merge.json says, whatever way it is written."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def evaluation_link(file: Path, adapter: str) -> tuple[str, str] | None:
    """(sha256 of eval.json, how many questions), where it is of this adapter; None: it is not, or is missing."""
    try:
        content = read_bytes(file, TABLE)
        result = parse_json(content)
        weights = result.get("weights", {}).get("adapter")
        questions = int(result["questions"])
    except (*UNREADABLE, LookupError, TypeError, ValueError, AttributeError):
        return None
    if weights not in (None, adapter):
        return None
    return hashlib.sha256(content).hexdigest(), f"eval.json, {questions} questions"


def proof_table(links: Sequence[ProvenLink]) -> str:
    """Markdown of the links, between two comments; empty for none."""
    if not links:
        return ""
    rows = [f"| {link.name} | `{link.digest}` | `{link.chain}` | {link.text} |" for link in links]
    lead = "Each line has the sha256 of a link of this training, and the chain with all links before it:"
    head = ["| link | sha256 | chain | of |", "|---|---|---|---|"]
    return "\n".join([BEGIN, "## Proof", "", lead, "", *head, *rows, END])


def parse_proof(card: str) -> list[ProvenLink]:
    """The links in a model card; empty for none."""
    _, begin, rest = card.partition(BEGIN)
    text, end, _ = rest.partition(END)
    return [ProvenLink(*row) for row in _ROW.findall(text)] if begin and end else []
