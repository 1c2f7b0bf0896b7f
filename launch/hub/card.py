"""README.md of a repository on the hub: the card of the folder, with what the run proves of itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from launch.planning.plan import Plan
from launch.planning.plan_table import plan_rows
from launch.report.evaluations import OVERALL, EvaluationFile, pairs_of, read_evaluation_files, scores
from launch.run.directory import RunDirectory
from launch.untrusted_files import UNREADABLE, read_json, read_mapping, read_text

_CODE = re.compile(r"```python\n.*?```", re.DOTALL)
_SAFE = str.maketrans({"|": "\\|", "\n": " ", "`": "'", "<": "&lt;"})  # in a cell of a Markdown table


def card_for_hub(run: RunDirectory, folder: Path, repo_id: str) -> str:
    """The card of a run's adapter or merged model in `folder`, as it reads on the hub.

    Its code names the repository where the folder's own card says ".". Below follow the plan, the digests of data and
    base, the versions of the libraries and the paired evaluation, as far as the run's folder has them.
    """
    try:
        text = read_text(folder / "README.md")
    except UNREADABLE:
        text = f"# {run.name}\n"
    text = _CODE.sub(lambda match: match[0].replace('"."', f'"{repo_id}"'), text)
    text = text.replace("In this folder:", "From the hub:").replace(
        "In this folder, with", "From the hub, with"
    )
    text = text.replace("vllm serve .", f"vllm serve {repo_id}")
    plan = Plan.read(run.plan_file)
    parts = [text.rstrip("\n"), _plan(plan), _digests(plan), _versions(run)]
    parts += [_evaluation(each) for each in read_evaluation_files(run)[0]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell.translate(_SAFE) for cell in row)} |" for row in rows)])


def _plan(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = [*plan_rows(plan)]
    return f"## Plan\n\nEvery number of the run, derived before it started:\n\n{_table(('number', 'value'), rows)}"


def _digests(plan: Plan) -> str:
    rows: list[tuple[str, ...]] = [
        ("training data", plan.dataset_fingerprint),
        ("recipe", plan.recipe_fingerprint),
    ]
    rows += list(plan.identity.items())
    return f"## Data and base by content\n\n{_table(('part', 'digest'), rows)}"


def _versions(run: RunDirectory) -> str:
    try:
        environment: Any = read_json(run.environment_file)
        versions = {"python": environment["python"], **environment["versions"]}
        rows: list[tuple[str, ...]] = [(str(name), str(version)) for name, version in versions.items()]
    except (*UNREADABLE, LookupError, TypeError, AttributeError):
        return ""
    return f"## Versions\n\n{_table(('library', 'version'), rows)}"


def _evaluation(evaluation: EvaluationFile) -> str:
    rows: list[tuple[str, ...]] = []
    for variant in evaluation.variants:
        score = scores(evaluation, variant)[OVERALL]
        interval = f"{score.low:.1f} to {score.high:.1f} %"
        rows.append((variant, f"{score.percent:.1f} %", interval, f"{score.correct} of {score.count}"))
    pairs: list[tuple[str, ...]] = [
        (each.before, each.after, f"+{each.gained}", f"-{each.lost}", f"{each.p:.2g}")
        for each in pairs_of(evaluation)
    ]
    head = ("model", "relaxed accuracy", "95 % interval (Wilson)", "correct")
    text = f"## Evaluation: {evaluation.title}\n\n{_table(head, rows)}"
    if pairs:
        head_of_pairs = ("before", "after", "gained", "lost", "p (McNemar)")
        text += f"\n\nThe same questions, paired:\n\n{_table(head_of_pairs, pairs)}"
    return text


def describe_run(run: RunDirectory) -> str:
    """The message of a commit: which run, and the digest of what was trained on."""
    try:
        fingerprint = read_mapping(run.plan_file)["dataset_fingerprint"][:12]
    except (*UNREADABLE, ValueError, LookupError, TypeError):
        return f"samestep run {run.name}"
    return f"samestep run {run.name}, data {fingerprint}"
