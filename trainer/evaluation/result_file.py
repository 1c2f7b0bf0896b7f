"""Answers on disk: they belong to a model, a checkpoint and a split, and a later evaluation loses none of them.

One file holds a split (or so many samples of it) and a checkpoint, every model beside the others. What was asked
earlier stays in it as long as it is an answer of the same weights to the same questions; else the older file gets
another name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write
from launch.checkpoints.adapter_file import ADAPTER_WEIGHTS
from launch.run.variants import from_worse_to_better, parse_variant
from launch.untrusted_files import TABLE, UNREADABLE, read_mapping
from trainer.evaluation.metric_functions import RELAXED, Metrics, figures
from trainer.evaluation.metrics import Accuracy, Paired, paired, summary_of

_QUESTION = ("row", "query", "label", "human_or_machine")


@dataclass(frozen=True)
class Kept:
    """`result`: what is to be written. `models`: those whose answers stay from earlier; `aside`: the older file's
    new name, where it holds answers of other weights or to other questions."""

    result: dict[str, Any]
    models: tuple[str, ...] = ()
    aside: Path | None = None


def with_earlier_answers(
    result: dict[str, Any],
    file: Path,
    weights: Mapping[str, str | None],
    adapter: Path,
    metrics: Metrics = RELAXED,
) -> Kept:
    """Return a result with the answers that `file` holds of other models. Writes nothing.

    `result`: what eval.json holds of the models asked now, of the weights that answered. `weights`: what every model is
    of now, in the models' order; None where that is not known. `adapter`: its folder, whose age judges files that do
    not say it. Earlier answers are scored again: the rule may have changed since.
    """
    older = _read(file)
    if older is None:
        return Kept(result, (), _free_name(file) if file.exists() else None)
    if not _same_questions(older, result):
        return Kept(result, (), _free_name(file))
    current = {
        model
        for model in older["accuracy"]
        if _is_current(model, older, weights, adapter) and _same_prompt(model, older, result)
    }
    stale = older["accuracy"].keys() - current
    carried = [model for model in weights if model in current - result["accuracy"].keys()]
    models = [model for model in weights if model in {*carried, *result["accuracy"]}]
    answers = {each["row"]: each for each in older["predictions"]}
    predictions = [
        {key: each[key] for key in _QUESTION}
        | {m: _scored(answers[each["row"]][m], each, metrics) if m in carried else each[m] for m in models}
        for each in result["predictions"]
    ]
    pairs = compared(predictions, models)
    # Of all models in the file: an evaluation of the merged one alone says nothing of the base's weights.
    facts: dict[str, Any] = {
        key: {**older.get(key, {}), **result[key]} for key in ("identity", "differs") if key in result
    }
    whole = {
        **result,
        **facts,
        "weights": {
            m: _weights_of(m, older, weights) if m in carried else result["weights"][m] for m in models
        },
        "products": {m: (older if m in carried else result).get("products", {}).get(m) for m in models},
        "finished_of": {m: _finished(older, m) if m in carried else result["finished"] for m in models},
        "accuracy": {m: _accuracy(m, predictions) if m in carried else result["accuracy"][m] for m in models},
        "prompts": {m: (older if m in carried else result).get("prompts", {}).get(m) for m in models},
        "metrics": figures(predictions, models, metrics),
        "predictions": predictions,
        "mcnemar_p": probabilities(pairs),
        "paired": pairs,
    }
    return Kept(whole, tuple(carried), _free_name(file) if stale else None)


def _weights_of(model: str, older: dict[str, Any], weights: Mapping[str, str | None]) -> str | None:
    recorded: str | None = older.get("weights", {}).get(model)
    return recorded or weights[model]


def _scored(answer: dict[str, Any], question: dict[str, Any], metrics: Metrics) -> dict[str, Any]:
    prediction, labels = answer["prediction"], question["label"]
    return {
        **answer,
        "correct": metrics.is_correct(prediction, labels),
        "scores": metrics.score(prediction, labels),
    }


def _accuracy(model: str, predictions: Sequence[dict[str, Any]]) -> dict[str, Accuracy]:
    return summary_of((each[model]["correct"], each["human_or_machine"]) for each in predictions)


def compared(predictions: Sequence[dict[str, Any]], models: Sequence[str]) -> dict[str, Paired]:
    """Compare every pair of models on the same questions, from the base to what was made of it: `base -> adapter`."""
    return {
        f"{before} -> {after}": paired(
            [each[before]["correct"] for each in predictions],
            [each[after]["correct"] for each in predictions],
        )
        for before, after in combinations(from_worse_to_better(models), 2)
    }


def probabilities(pairs: Mapping[str, Paired]) -> dict[str, float]:
    """Return McNemar's p of every pair, as eval.json has had it from the first."""
    return {pair: each["p"] for pair, each in pairs.items()}


def models_in(file: Path) -> list[str]:
    """Return the models whose answers an older result holds; none where it cannot be read."""
    older = _read(file)
    return [model for model in older["accuracy"] if _is_name(model)] if older else []


def _is_name(model: str) -> bool:
    try:
        parse_variant(model)
    except ValueError:
        return False
    return True


def write_result(kept: Kept, file: Path) -> None:
    """Replace `file` in one step, after the older one got its other name."""
    if kept.aside is not None:
        try:
            os.link(file, kept.aside)  # ended right here, nothing is missing under the name that is looked at
        except OSError:  # a disk without hard links
            file.rename(kept.aside)
    atomic_write(file, json.dumps(kept.result, indent=1, ensure_ascii=False) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    """An older result, of older versions too; None without one that can be read."""
    try:
        older = read_mapping(file, TABLE)
        models = list(older["accuracy"])
        for each in older["predictions"]:
            _ = [each[key] for key in _QUESTION] + [each[model]["correct"] for model in models]
            _ = [each[model]["prediction"].strip() for model in models]
    except (*UNREADABLE, LookupError, TypeError, AttributeError):
        return None
    return older


def _same_questions(older: dict[str, Any], result: dict[str, Any]) -> bool:
    """Rows, prompts, the longest answer, and the base and its processor by content.

    What an older version did not write down is not compared.
    """
    same_request = (
        [{key: each[key] for key in _QUESTION} for each in one["predictions"]] for one in (older, result)
    )
    first, second = same_request
    before, now = (one.get("identity", {}) for one in (older, result))
    if any(before[part] != now[part] for part in before.keys() & now.keys()):
        return False
    return first == second and all(
        older.get(key, result.get(key)) == result.get(key) for key in ("max_new_tokens", "prompts_sha256")
    )


def _is_current(model: str, older: dict[str, Any], weights: Mapping[str, str | None], adapter: Path) -> bool:
    """Its answers are of the weights that the run has now; those of a checkpoint that is gone stay what they are."""
    if not _is_name(model):
        return False
    name = parse_variant(model)
    if name.weights == "base":
        return True
    if (recorded := older.get("weights", {}).get(model)) is not None:
        now = weights.get(model)
        return bool(recorded == now) or (now is None and name.step is not None)
    try:  # an older version did not say: by age
        return (
            datetime.fromisoformat(_finished(older, model)).timestamp()
            >= (adapter / ADAPTER_WEIGHTS).stat().st_mtime
        )
    except (OSError, ValueError, TypeError):
        return False


def _same_prompt(model: str, older: dict[str, Any], result: dict[str, Any]) -> bool:
    """It was not asked again with another system message under the same name."""
    before, now = (one.get("prompts", {}).get(model) for one in (older, result))
    return before is None or now is None or before == now


def _finished(older: dict[str, Any], model: str) -> str:
    return str(older.get("finished_of", {}).get(model, older.get("finished", "")))


def _free_name(file: Path) -> Path:
    return file.with_name(f"{file.stem}.{datetime.now():%Y%m%d-%H%M%S-%f}{file.suffix}")
