"""Relaxed accuracy over many questions (the rule: `trainer.data.relaxed_accuracy`), and what a figure is worth."""

import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

from launch.statistics import mcnemar, wilson_interval
from trainer.data.relaxed_accuracy import correct

GROUPS = {0: "human", 1: "augmented"}  # by ChartQA's column human_or_machine


class Prediction(TypedDict):
    """One answered question; rows with more keys will do.

    `target` is the first label of the row: the harnesses know one answer a question and score by it.
    """

    prediction: str
    target: str
    human_or_machine: int | None


class Accuracy(TypedDict):
    """`percent`, its `standard_error` and 95 % `interval` in percentage points; all None without a question."""

    percent: float | None
    standard_error: float | None
    interval: list[float] | None
    correct: int
    count: int


class Paired(TypedDict):
    """Two models on the same questions: `gained` by the second, `lost` by it, and `p` of `mcnemar`."""

    gained: int
    lost: int
    p: float


def summary(predictions: Iterable[Prediction]) -> dict[str, Accuracy]:
    """Return the relaxed accuracy of the questions of people ("human"), of machines ("augmented"), and of all
    ("overall").
    """
    return summary_of(
        (correct(row["prediction"], row["target"]), row["human_or_machine"]) for row in predictions
    )


def summary_of(outcomes_and_kinds: Iterable[tuple[bool, int | None]]) -> dict[str, Accuracy]:
    """Summarize as `summary` outcomes by whatever metric, each with the kind of its question (None: not known)."""
    outcomes: dict[str, list[bool]] = {group: [] for group in (*GROUPS.values(), "overall")}
    for outcome, kind in outcomes_and_kinds:
        if kind is not None:
            outcomes[GROUPS[kind]].append(outcome)
        outcomes["overall"].append(outcome)
    return {group: _accuracy(of_group) for group, of_group in outcomes.items()}


def _accuracy(outcomes: Sequence[bool]) -> Accuracy:
    count, right = len(outcomes), sum(outcomes)
    if count == 0:
        return Accuracy(percent=None, standard_error=None, interval=None, correct=0, count=0)
    share = right / count
    return Accuracy(
        percent=100 * share,
        standard_error=100 * math.sqrt(share * (1 - share) / count),
        interval=wilson(right, count),
        correct=right,
        count=count,
    )


def wilson(right: int, count: int) -> list[float]:
    """Return the 95 % interval of a share in percent: Wilson's score interval (JASA 1927), which stays within 0 and
    100.

    Of few questions, or of nearly all right ones, the standard error says nothing.
    """
    low, high = wilson_interval(right, count)
    return [100 * low, 100 * high]


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare two models on the same questions: what was gained and lost. ValueError when their lengths differ."""
    return Paired(
        gained=sum(b < a for b, a in zip(before, after, strict=True)),
        lost=sum(b > a for b, a in zip(before, after, strict=True)),
        p=mcnemar(before, after),
    )
