"""A downloaded adapter or merged model, held against the proof in its model card. Needs no run, data, base or GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launch.audit.verify import Link
from launch.checkpoints.adapter_file import ADAPTER_WEIGHTS, is_whole, read_digest
from launch.errors import ConfigError
from launch.inputs.identity import short
from launch.planning.plan import Plan
from launch.run.merged_model import DIGEST, read_record, weights_are_whole
from launch.run.proof import (
    ProvenLink,
    chain_links,
    evaluation_link,
    merge_digest,
    parse_proof,
    plan_digest,
    steps_link,
)
from launch.untrusted_files import UNREADABLE, read_text, reason_of

CARD, RECORDS = "README.md", "run"
"""A pushed adapter has the records of its run in a folder of that name."""


def has_proof(folder: Path) -> bool:
    """A model card with a proof lies there, as far as it can be read."""
    try:
        return bool(parse_proof(read_text(folder / CARD)))
    except UNREADABLE:
        return False


def verify_folder(folder: Path) -> list[Link]:
    """Every line of the proof: whether the chain is unbroken, and whether what lies in the folder has these digests.

    Raises:
        ConfigError: there is no proof.
    """
    try:
        proof = parse_proof(read_text(folder / CARD))
    except UNREADABLE as error:
        raise ConfigError(f"{folder / CARD}: cannot be read ({reason_of(error)})") from None
    if not proof:
        raise ConfigError(f"{folder / CARD}: holds no proof of a run; `samestep evaluate` writes it anew")
    return [_chain(proof), *(_link(folder, link, proof) for link in proof)]


def _chain(proof: list[ProvenLink]) -> Link:
    again = chain_links((link.name, link.digest, link.text) for link in proof)
    for written, computed in zip(proof, again, strict=True):
        if written.chain != computed.chain:
            return Link("chain", "failed", f"breaks at {written.name}: a line was altered, or one is missing")
    return Link("chain", "ok", f"{len(proof)} links, {short(proof[-1].chain)}")


def _link(folder: Path, link: ProvenLink, proof: list[ProvenLink]) -> Link:
    adapter = next((each.digest for each in proof if each.name == "adapter"), "")
    finders: dict[str, Callable[[], str | None]] = {
        "data": lambda: Plan.read(folder / RECORDS / "plan.json").dataset_fingerprint,
        "plan": lambda: plan_digest(folder / RECORDS / "plan.json"),
        "steps": lambda: steps_link(folder / RECORDS / "metrics.jsonl")[0],
        "adapter": lambda: _adapter(folder),
        "merge": lambda: _merge(folder, adapter),
        "evaluation": lambda: _evaluation(folder, adapter),
    }
    said = f"{short(link.digest)}, {link.text}"
    try:
        digest = finders[link.name]() if link.name in finders else None
    except (ConfigError, *UNREADABLE):
        digest = None
    if digest is None:
        return Link(link.name, "not checked", f"{said}; what it is of does not lie in this folder")
    if digest != link.digest:
        return Link(link.name, "failed", f"{said} in the card, {short(digest)} in the folder")
    return Link(link.name, "ok", said)


def _adapter(folder: Path) -> str | None:
    if not (
        folder / ADAPTER_WEIGHTS
    ).exists():  # a merged model's folder: merge.json says of which adapter it is
        recorded = read_record(folder).get(DIGEST)
        return None if recorded is None else str(recorded)
    digest = read_digest(folder) if is_whole(folder) else None
    return "damaged" if digest is None else digest


def _merge(folder: Path, adapter: str) -> str | None:
    record = read_record(folder)
    if not record:
        return None
    return merge_digest(record) if weights_are_whole(folder) and record.get(DIGEST) == adapter else "damaged"


def _evaluation(folder: Path, adapter: str) -> str | None:
    file = folder / RECORDS / "eval.json"
    link = evaluation_link(file, adapter)
    return link[0] if link else ("damaged" if file.exists() else None)
