"""How well an answer agrees with the accepted ones: the metrics that `evaluation.metrics` names, and a user's own."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.errors import ConfigError, RunError
from launch.inputs.own_metrics import metric_file
from launch.recipe.schema import Recipe
from trainer.data.relaxed_accuracy import correct
from trainer.data.row_errors import describe_error

logger = logging.getLogger("trainer")

Score = Callable[[str, Sequence[str]], float]
"""From an answer and the accepted ones to a share of 1."""

_ANLS_THRESHOLD = 0.5


def relaxed_accuracy(prediction: str, labels: Sequence[str]) -> float:
    """Score by ChartQA's rule (`trainer.data.relaxed_accuracy`), against the first label as the public harnesses do."""
    return float(correct(prediction, labels[0]))


def exact_match(prediction: str, labels: Sequence[str]) -> float:
    """Return 1 for one of the labels, but for case, punctuation, articles and white space.

    Source: the normalization of SQuAD's evaluation script (Rajpurkar et al. 2016).
    """
    return float(any(_normalized(prediction) == _normalized(label) for label in labels))


def token_f1(prediction: str, labels: Sequence[str]) -> float:
    """Return the best F1 of an answer and a label, normalized as by `exact_match`. Source: SQuAD's script."""
    return max(_f1(_normalized(prediction).split(), _normalized(label).split()) for label in labels)


def anls(prediction: str, labels: Sequence[str]) -> float:
    """Return the best 1 - edit distance / longer length to a label, 0 from a distance of half the length on; case is
    ignored.

    Source: average normalized Levenshtein similarity of ST-VQA and DocVQA (Biten et al. 2019, threshold 0.5).
    """
    return max(_similarity(_lower(prediction), _lower(label)) for label in labels)


METRICS: dict[str, Score] = {
    "relaxed_accuracy": relaxed_accuracy,
    "exact_match": exact_match,
    "anls": anls,
    "token_f1": token_f1,
}


@dataclass(frozen=True)
class Metrics:
    """The metrics of an evaluation, by name. The first one says which answers are correct, graded ones from a half."""

    scores: Mapping[str, Score]

    @property
    def first(self) -> str:
        """The name of the metric that says which answers are correct."""
        return next(iter(self.scores))

    def score(self, prediction: str, labels: Sequence[str]) -> dict[str, float]:
        """Score an answer by every metric.

        Raises:
            RunError: a function of the user's own fails, or answers with no share of 1.
        """
        return {name: _judged(name, score, prediction, labels) for name, score in self.scores.items()}

    def is_correct(self, prediction: str, labels: Sequence[str]) -> bool:
        """Say whether an answer is correct, by the first metric."""
        return _judged(self.first, self.scores[self.first], prediction, labels) >= 0.5


RELAXED = Metrics({"relaxed_accuracy": relaxed_accuracy})
"""ChartQA's, and that of every evaluation of older versions."""
OF_TEXT = Metrics({name: METRICS[name] for name in ("exact_match", "token_f1")})


def load_metrics(recipe: Recipe, has_kinds: bool) -> Metrics:
    """Return the recipe's metrics; `auto`: relaxed accuracy where rows have ChartQA's kinds of questions, else those of
    text.

    Raises:
        ConfigError: a function of the user's own cannot be loaded.
    """
    names = recipe.evaluation.metrics
    if names == "auto":
        return RELAXED if has_kinds else OF_TEXT
    return Metrics({_short(name): METRICS[name] if name in METRICS else _own(name) for name in names})


def _short(name: str) -> str:
    """`/home/me/scores.py:close` -> `scores:close`."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).stem}{colon}{function}" if colon else name


@cache
def _own(name: str) -> Score:
    path, function = metric_file(name)
    key = f"evaluation.metrics: {name}"
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}; put it beside the recipe")
    spec = importlib.util.spec_from_file_location(f"samestep_metric_{path.stem}", path)
    assert spec is not None  # of a file that ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a program of the user's
        raise ConfigError(f"{key}: {path} cannot be loaded ({describe_error(error)}); correct it") from error
    score: Any = getattr(module, function, None)
    if not callable(score):
        raise ConfigError(
            f"{key}: {path} has no function {function}; define {function}(prediction: str, labels: list[str]) -> float"
        )
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info("evaluation.metrics: %s is the function %s of %s", _short(name), function, path)
    return lambda prediction, labels: score(prediction, list(labels))


def _judged(name: str, score: Score, prediction: str, labels: Sequence[str]) -> float:
    if name in METRICS:
        return score(prediction, labels)
    try:
        answer: Any = score(prediction, labels)
        value = math.nan if isinstance(answer, str | bytes) or answer is None else float(answer)
    except (Exception, SystemExit) as error:  # a program of the user's
        raise RunError(
            f"evaluation.metrics: {name} fails on the answer {prediction[:80]!r} ({describe_error(error)}); correct it"
        ) from error
    if not 0 <= value <= 1:
        raise RunError(
            f"evaluation.metrics: {name} makes {repr(answer)[:80]} of the answer {prediction[:80]!r}; it must return a "
            "number from 0 to 1"
        )
    return value


def figures(
    predictions: Sequence[Mapping[str, Any]], models: Sequence[str], metrics: Metrics
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Return metric -> model -> `percent`, its `standard_error` in percentage points, and `count`."""
    return {
        name: {model: _figure([each[model]["scores"][name] for each in predictions]) for model in models}
        for name in metrics.scores
    }


def _figure(scores: Sequence[float]) -> dict[str, float | int]:
    count = len(scores)
    mean = sum(scores) / count
    variance = sum((score - mean) ** 2 for score in scores) / count
    return {"percent": 100 * mean, "standard_error": 100 * math.sqrt(variance / count), "count": count}


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalized(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(prediction: Sequence[str], label: Sequence[str]) -> float:
    if not prediction or not label:
        return float(prediction == label)
    same = sum((Counter(prediction) & Counter(label)).values())
    return 2 * same / (len(prediction) + len(label))


def _lower(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(prediction: str, label: str) -> float:
    longer = max(len(prediction), len(label))
    distance = _edit_distance(prediction, label) / longer if longer else 0.0
    return 1 - distance if distance < _ANLS_THRESHOLD else 0.0


def _edit_distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, 1):
        above, row[0] = row[0], place
        for column, expected in enumerate(other, 1):
            above, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, above + (letter != expected)),
            )
    return row[-1]
