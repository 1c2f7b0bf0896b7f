"""`samestep report`: from the folders of one or several runs to one HTML file that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write, refuse_readonly
from launch.errors import ConfigError
from launch.planning.plan_table import plan_rows
from launch.recipe.fingerprint import altering_values
from launch.report import words
from launch.report.blame import BlamedRun, make_blamed
from launch.report.curves import curves, median_speed
from launch.report.evaluations import OVERALL, EvaluationFile, VariantPair, pair_runs, pairs_of, scores
from launch.report.gallery import Gallery, make_gallery
from launch.report.records import RunRecords, read_records, sameness_of
from launch.run.blamed import CHANGED_LATER
from launch.run.directory import RunDirectory
from launch.versions import version_line

REPORT_FILE = "report.html"
_PAGE = Path(__file__).parent / "page"
VARIANTS = {
    "base": "the base model, as it was before training",
    "adapter": "the base with the trained adapter",
    "shuffled": "the adapter, every question with another chart",
    "merged": "the merged model",
}


METRIC_TITLES = {
    "relaxed_accuracy": "relaxed accuracy: a number may be off by 5 %, a text must be equal",
    "exact_match": "exact match, but for case, articles and punctuation",
}


def write_report(runs: Sequence[RunDirectory], output: Path | None = None) -> Path:
    """Write the report of one run, or of several side by side. Returns its path.

    `output`: `report.html` in the run's folder by default; of several runs, beside the first one's folder.

    Raises:
        ConfigError: a run's recipe or plan cannot be read, a run is named twice, or there is no writing the file.
    """
    if len({run.path for run in runs}) < len(runs):
        raise ConfigError("RUN: the same run is named twice; name every run once")
    folder = runs[0].path if len(runs) == 1 else runs[0].path.parent
    file = (output or folder / REPORT_FILE).absolute()
    if file.is_dir():
        raise ConfigError(f"--output: {file} is a folder; name a file, such as {file / REPORT_FILE}")
    if not file.parent.is_dir():
        raise ConfigError(f"--output: {file.parent} is no folder; make it, or choose another")
    refuse_readonly(file.parent, "the report")
    records = [read_records(run) for run in runs]
    atomic_write(file, render(records, make_gallery(records), make_blamed(records)))
    return file


def render(runs: Sequence[RunRecords], gallery: Gallery | None, blamed: Sequence[BlamedRun] = ()) -> str:
    """The text of the page. Whatever the runs' files say is escaped, and no script but ours may run."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: "-" if value is None else f"{value:.4g}"
    # jinja2's rendering of the style and the scripts must be byte for byte what the policy allows.
    script, plotly = _source("page.js"), _inline(get_plotlyjs())
    return environment.get_template("report.html.j2").render(
        runs=[_run(each) for each in runs],
        several=len(runs) > 1,
        gallery=gallery,
        blamed=blamed,
        changed_later=CHANGED_LATER,
        charts={"curves": curves(runs), "accuracy": _accuracy_chart(runs)},
        pairs=_pairs_between(runs),
        sameness=[sameness_of(first, second) for first, second in combinations(runs, 2)],
        differing=_differing_values(runs),
        style=_source("style.css"),
        script=script,
        plotly=plotly,
        hashes=[_csp_hash(script), _csp_hash(plotly)],
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        versions=version_line(),
    )


def _source(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script that may stand in a page: `</script` inside a string would end it."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _csp_hash(script: str) -> str:
    """The source expression of a script for Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _run(records: RunRecords) -> dict[str, Any]:
    """What the template shows of one run."""
    status = records.status
    return {
        "name": records.name,
        "state": status.state,
        "because": status.because,
        "headline": words.headline(records),
        "facts": _facts(records),
        "evaluations": [_evaluation(each) for each in records.evaluations],
        "recipe": words.recipe_rows(records),
        "system_message": records.recipe.data.system_message,
        "recipe_text": records.recipe_text,
        "plan": plan_rows(records.plan),
        "environment": words.environment_rows(records.environment),
        "attempts": words.attempt_rows(records.attempts, records.local_attempts),
        "checkpoints": words.checkpoint_rows(records.checkpoints),
        "newest_checkpoint": words.checkpoint_words(records),
        "identity": records.plan.identity,
        "stream": records.stream_digest,
        "steps": len(records.steps),
        "adapter": records.adapter_digest,
        "allowed": records.plan.allowed,
        "started_from": records.plan.started_from,
        "merges": [
            {
                "name": merge.folder.name,
                "rows": words.merge_rows(merge),
                "logits": words.comparison_rows(merge.comparison),
                "answers": words.same_answers(merge.comparison),
            }
            for merge in records.merges
        ],
        "problems": records.problems,
    }


def _facts(records: RunRecords) -> list[tuple[str, str, str]]:
    """(what, value, note) of the figures at the top."""
    facts = []
    if records.evaluations:
        evaluation = records.evaluations[0]
        overall = {variant: scores(evaluation, variant)[OVERALL] for variant in evaluation.variants}
        shown = next((name for name in ("adapter", "merged") if name in overall), evaluation.variants[0])
        before = f"base {overall['base'].percent:.1f} %" if "base" in overall and shown != "base" else ""
        facts.append(("Accuracy", f"{overall[shown].percent:.1f} %", before or evaluation.title))
    speed, memory = median_speed(records.steps), words.memory_words(records)
    losses = [(words.last_loss(records.steps), "Training loss", "last step")]
    losses.append((words.last_loss(records.losses), "Validation loss", "last evaluation"))
    facts += [(name, f"{loss:.3f}", note) for loss, name, note in losses if loss is not None]
    step = records.steps[-1]["step"] if records.steps else 0
    facts.append(("Steps", f"{step:,}", f"of {records.plan.max_steps:,}"))
    if records.steps:
        facts.append(("Time in steps", words.training_time(records), "evaluations and saves not counted"))
    if speed is not None:
        facts.append(("Speed", f"{speed:,.0f}", "tokens per second, median step"))
    if memory is not None:
        facts.append(("Memory", memory, "most reserved on rank 0"))
    return facts


def _evaluation(evaluation: EvaluationFile) -> dict[str, Any]:
    by_variant = {variant: scores(evaluation, variant) for variant in evaluation.variants}
    return {
        "title": evaluation.title,
        "file": evaluation.file.name,
        "metric": METRIC_TITLES.get(evaluation.metric, evaluation.metric),
        "groups": list(next(iter(by_variant.values()))),
        "variants": [
            (variant, _meaning(variant), list(of_variant.values()))
            for variant, of_variant in by_variant.items()
        ],
        "pairs": pairs_of(evaluation),
    }


def _meaning(variant: str) -> str:
    """What a variant is, in words; empty where its name says it."""
    name, without, _ = variant.partition("-no-prompt")
    meaning = VARIANTS.get(name, "")
    return f"{meaning or name}, without the system message" if without else meaning


def _accuracy_chart(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Accuracy of every variant of the runs' first evaluations, in percent, with its interval."""
    rows = []
    for position, run in enumerate(runs):
        for evaluation in run.evaluations[:1]:
            for variant in evaluation.variants:
                score = scores(evaluation, variant)[OVERALL]
                name = f"{run.name} {variant}" if len(runs) > 1 else variant
                rows.append(
                    {
                        "name": name,
                        "run": position,
                        "percent": score.percent,
                        "low": score.low,
                        "high": score.high,
                    }
                )
    return rows


def _pairs_between(runs: Sequence[RunRecords]) -> list[VariantPair]:
    """Every variant that two runs have, on the same questions of the same split."""
    pairs = []
    for first, second in combinations(runs, 2):
        for mine in first.evaluations[:1]:
            theirs = next((each for each in second.evaluations if each.split == mine.split), None)
            if theirs is not None:
                shared = [variant for variant in mine.variants if variant in theirs.variants]
                paired = (pair_runs(mine, theirs, variant) for variant in shared)
                pairs += [pair for pair in paired if pair is not None]
    return pairs


def _differing_values(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """(key, value of every run) of the recipe values that alter numbers and are not the same in all runs."""
    if len(runs) < 2:
        return []
    values = [altering_values(run.recipe) for run in runs]
    return [
        (key, [str(of_run.get(key)) for of_run in values])
        for key in values[0]
        if len({str(of_run.get(key)) for of_run in values}) > 1
    ]
