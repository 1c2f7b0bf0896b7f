"""The chain of a run, checked on any machine: data, plan, every step, checkpoints, adapter, merge, evaluation.

Torch-free, and without the data or the base: what needs them is checked where they are, and said where they are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from launch.checkpoints.adapter_file import ADAPTER_WEIGHTS, read_digest
from launch.checkpoints.manifest import OLDER, read_manifest
from launch.errors import CheckpointError, ConfigError
from launch.inputs.dataset_index import Index, read_index
from launch.inputs.identity import recorded_identity, short
from launch.planning.plan import Plan
from launch.planning.run_steps import stream_of
from launch.recipe.fingerprint import recipe_fingerprint
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.run.damaged_adapter import adapter_damage
from launch.run.directory import RunDirectory, is_done_at
from launch.run.figures import read_steps
from launch.run.merged_model import DIGEST, read_record
from launch.run.proof import chained, parse_proof, proof_of
from launch.untrusted_files import UNREADABLE, printable, read_mapping, read_text, reason_of

State = Literal["ok", "failed", "not checked"]
_NO_ADAPTER: tuple[State, str] = ("not checked", "the run's adapter is missing or damaged")


@dataclass(frozen=True)
class Link:
    """One link of the chain: what it is, whether it holds, and the digest or the reason in words."""

    name: str
    state: State
    text: str


def verify_run(run: RunDirectory, progress: Callable[[str], None] = lambda _: None) -> list[Link]:
    """Every link, in the order of the chain. Reads all bytes of checkpoints; `progress` is told which.

    Raises:
        ConfigError: the folder has no recipe or plan that can be read.
    """
    recipe, plan = load_recipe(run.recipe_file), _plan_of(run)
    try:
        index = read_index(recipe)
    except ConfigError:  # its files are not on this machine
        index = None
    return [
        _data(plan, index),
        _plan(recipe, plan),
        _steps(run, recipe, plan, index),
        *_checkpoints(run, plan, progress),
        _adapter(run, plan),
        *_merges(run),
        *_evaluations(run),
        *_cards(run),
    ]


def _plan_of(run: RunDirectory) -> Plan:
    try:
        return Plan.read(run.plan_file)
    except UNREADABLE as error:
        raise ConfigError(f"{run.plan_file}: cannot be read ({reason_of(error)})") from None


def _data(plan: Plan, index: Index | None) -> Link:
    recorded = f"rows of train {short(plan.dataset_fingerprint)}"
    if index is None:
        return Link("data", "not checked", f"{recorded}; the data is not prepared on this machine")
    if index.fingerprint != plan.dataset_fingerprint:
        return Link("data", "failed", f"{recorded} in the plan, {short(index.fingerprint)} on this machine")
    return Link("data", "ok", f"{recorded}, the same on this machine")


def _plan(recipe: Recipe, plan: Plan) -> Link:
    if recipe_fingerprint(recipe) != plan.recipe_fingerprint:
        return Link("plan", "failed", "recipe.yaml is not the recipe that plan.json was made of")
    return Link("plan", "ok", f"{short(plan.digest())} of recipe {short(plan.recipe_fingerprint)}")


def _steps(run: RunDirectory, recipe: Recipe, plan: Plan, index: Index | None) -> Link:
    try:
        steps = read_steps(run.metrics_file)
    except ConfigError as error:
        return Link("steps", "failed", str(error))
    last = max(steps, default=0)
    begin = min(steps, default=1) if plan.started_from else 1  # with the source's next step
    if missing := [step for step in range(begin, last + 1) if step not in steps]:
        return Link(
            "steps", "failed", f"metrics.jsonl has no line of {len(missing)} steps, the first is {missing[0]}"
        )
    taken = max((int(folder.name.rpartition("-")[2]) for folder in run.checkpoints()), default=0)
    if is_done_at(run, plan.max_steps):
        taken = max(taken, plan.max_steps)
    if taken > last and (
        steps or not plan.started_from
    ):  # a run begun elsewhere may have its first checkpoint alone
        return Link("steps", "failed", f"metrics.jsonl ends at step {last:,}, the run has taken {taken:,}")
    digests = {step: str(steps[step].get("samples_digest", "")) for step in range(begin, last + 1)}
    source = (
        f" from step {begin:,} on (the earlier ones are those of {plan.started_from})" if begin > 1 else ""
    )
    words = f"{last:,} of {plan.max_steps:,}{source}, chain {short(chained(digests.values()))}"
    if index is None or index.fingerprint != plan.dataset_fingerprint or plan.samples_digest != "content":
        return Link(
            "steps", "not checked", f"{words}; the digests are recomputed where the same data is prepared"
        )
    first = max(begin, plan.begin.step + 1)  # earlier steps were planned otherwise
    wrong = [
        step for step in range(first, last + 1) if digests[step] != _digest_of(step, recipe, plan, index)
    ]
    if wrong:
        return Link(
            "steps", "failed", f"{words}; step {wrong[0]} trained on other samples than the plan gives it"
        )
    return Link("steps", "ok", f"{words}; every digest recomputed from the plan and the data")


def _digest_of(step: int, recipe: Recipe, plan: Plan, index: Index) -> str:
    """As the trainer names the samples of a step (`trainer.metrics_log.step_rows_digest`)."""
    split, samples = index.splits["train"], stream_of(recipe, plan).samples(step - 1)
    return hashlib.sha256(b"".join(sorted(split.digests[sample] for sample in samples))).hexdigest()[:16]


def _checkpoints(run: RunDirectory, plan: Plan, progress: Callable[[str], None]) -> Iterator[Link]:
    for folder in run.checkpoints():
        progress(f"reading {folder.name}")
        try:
            facts = read_manifest(folder, verify=True)["facts"]
        except CheckpointError as error:
            text = printable(str(error).splitlines()[0]).replace(OLDER, "bring back a copy")
            yield Link(folder.name, "failed", text)
            continue
        identity = recorded_identity(facts).parts
        other = sorted(part for part, digest in plan.identity.items() if identity.get(part, digest) != digest)
        if facts.get("dataset_fingerprint") != plan.dataset_fingerprint or other:
            yield Link(
                folder.name,
                "failed",
                f"was written with other {', '.join(other) or 'rows of train'} than the plan's",
            )
        else:
            yield Link(folder.name, "ok", "every byte as published, of this plan's data and base")


def _adapter(run: RunDirectory, plan: Plan) -> Link:
    if not run.adapter.exists():
        return Link("adapter", "not checked", "not written yet")
    digest, damage = read_digest(run.adapter), adapter_damage(run)
    if damage or digest is None:
        return Link("adapter", "failed", damage or f"{run.adapter / ADAPTER_WEIGHTS} cannot be read")
    last = run.checkpoint(plan.max_steps)
    if not is_done_at(run, plan.max_steps) or not (last / ADAPTER_WEIGHTS).is_file():
        return Link(
            "adapter", "ok", f"{short(digest)}, whole; no checkpoint of the last step to compare with"
        )
    if (held := read_digest(last)) is None:
        return Link(
            "adapter", "ok", f"{short(digest)}, whole; {last.name} is damaged, nothing to compare with"
        )
    if held != digest:
        return Link("adapter", "failed", f"{short(digest)} is not what {last.name} holds")
    return Link("adapter", "ok", f"{short(digest)}, the tensors of {last.name}")


def _merges(run: RunDirectory) -> Iterator[Link]:
    digest = read_digest(run.adapter)
    for folder in (run.merged, run.merged_dequantized):
        if not folder.exists():
            continue
        record = read_record(folder)
        if digest is None:
            yield Link(folder.name, *_NO_ADAPTER)
        elif record.get(DIGEST) is None:
            yield Link(folder.name, "failed", "merge.json does not say of which adapter it is")
        elif record[DIGEST] != digest:
            yield Link(
                folder.name, "failed", "is of another adapter than the run's; `samestep merge` makes it anew"
            )
        else:
            yield Link(
                folder.name,
                "ok",
                f"of adapter {short(str(digest))}; {record.get('changed')} tensors changed, "
                f"{record.get('byte_identical')} byte-identical",
            )


def _evaluations(run: RunDirectory) -> Iterator[Link]:
    digest = read_digest(run.adapter)
    for file in sorted(run.path.glob("eval*.json")):
        try:
            result: dict[str, Any] = read_mapping(file)
        except UNREADABLE as error:
            text = f"cannot be read ({reason_of(error)}); `samestep evaluate` writes it anew"
            yield Link(file.name, "failed", text)
            continue
        try:
            weights = result["weights"]["adapter"] if "checkpoint" not in file.name else None
        except (LookupError, TypeError):
            yield Link(file.name, "not checked", "does not say which weights answered")
            continue
        if weights is not None and digest is None:
            yield Link(file.name, *_NO_ADAPTER)
        elif weights is not None and weights != digest:
            yield Link(
                file.name, "failed", "its answers are of another adapter; `samestep evaluate` asks anew"
            )
        elif weights is not None:
            yield Link(
                file.name,
                "ok",
                f"{result.get('questions')} questions, answered by adapter {short(str(digest))}",
            )


def _cards(run: RunDirectory) -> Iterator[Link]:
    """The proof that a model card holds, against what the run's folder has now."""
    digest = read_digest(run.adapter)
    for folder in (run.adapter, run.merged, run.merged_dequantized):
        try:
            written = parse_proof(read_text(folder / "README.md"))
        except UNREADABLE:
            continue
        if digest is None:
            yield Link(f"card of {folder.name}", *_NO_ADAPTER)
            continue
        merge = read_record(folder) if folder != run.adapter else None
        now = {link.name: link for link in proof_of(run, digest, merge)}
        wrong = [link.name for link in written if now.get(link.name) != link]
        if written and wrong:
            yield Link(
                f"card of {folder.name}", "failed", f"its {wrong[0]} is not that of the folder; evaluate anew"
            )
        elif written:
            yield Link(
                f"card of {folder.name}", "ok", f"{len(written)} links, chain {short(written[-1].chain)}"
            )


def to_json(links: Iterable[Link]) -> str:
    """A list of the links."""
    return json.dumps([link.__dict__ for link in links], indent=1)
