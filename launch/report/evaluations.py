"""The evaluations that a run's folder holds: questions, the answers of every variant, and how variants compare."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run.directory import RunDirectory
from launch.statistics import mcnemar, wilson_interval
from launch.untrusted_files import TABLE, UNREADABLE, read_mapping

# An older file that was moved aside has a date in its name.
_FILE = re.compile(r"eval(-[A-Za-z0-9-]+)?\.json")
_KINDS = {0: "human", 1: "augmented"}  # ChartQA's column human_or_machine
OVERALL = "all questions"


@dataclass(frozen=True)
class ScoredAnswer:
    """What a variant said to one question, and whether it counts as right."""

    text: str
    correct: bool


@dataclass(frozen=True)
class AnsweredQuestion:
    """One row of a split, with the answer of every variant. `kind`: human or augmented, empty where not known."""

    row: int
    text: str
    target: str
    kind: str
    answers: Mapping[str, ScoredAnswer]


@dataclass(frozen=True)
class EvaluationFile:
    """One evaluation file of a run. `variants`: what answered, in the file's order."""

    run: str
    file: Path
    split: str
    variants: tuple[str, ...]
    questions: tuple[AnsweredQuestion, ...]
    metric: str = "relaxed_accuracy"

    @property
    def title(self) -> str:
        """The file's name in words: `test split`, `checkpoint-40, validation split, 64 questions`."""
        parts = [match[0]] if (match := re.search(r"checkpoint-\d+", self.file.stem)) else []
        parts.append(f"{self.split} split")
        return ", ".join([*parts, f"{len(self.questions):,} questions"])


@dataclass(frozen=True)
class Score:
    """Right answers of one variant to one kind of question. `low`, `high`: Wilson's 95 % interval, in percent."""

    correct: int
    count: int
    percent: float
    low: float
    high: float


@dataclass(frozen=True)
class VariantPair:
    """Two series of answers to the same questions. `gained`: wrong before, right after; `p`: McNemar's exact test."""

    before: str
    after: str
    questions: int
    gained: int
    lost: int
    p: float


def read_evaluation_files(run: RunDirectory) -> tuple[list[EvaluationFile], list[str]]:
    """(every evaluation of the run, the whole test split first; why others cannot be shown)."""
    files = sorted(
        (file for file in run.path.iterdir() if _FILE.fullmatch(file.name)),
        key=lambda file: (len(file.name), file.name),
    )
    evaluations, problems = [], []
    for file in files:
        try:
            evaluations.append(_evaluation(run.name, file, read_mapping(file, TABLE)))
        except UNREADABLE as error:
            problems.append(f"{file.name}: cannot be read ({error})")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            problems.append(
                f"{file.name}: is no evaluation of this version ({type(error).__name__}: {error})"
            )
    return [each for each in evaluations if each.questions and each.variants], problems


def _evaluation(run: str, file: Path, content: Mapping[str, Any]) -> EvaluationFile:
    variants = tuple(str(variant) for variant in content["accuracy"])
    questions = tuple(
        AnsweredQuestion(
            row=int(each["row"]),
            text=str(each["query"]),
            target=str(each["label"][0]),
            kind=_KINDS.get(each.get("human_or_machine"), ""),
            answers={
                variant: ScoredAnswer(str(each[variant]["prediction"]), bool(each[variant]["correct"]))
                for variant in variants
            },
        )
        for each in content["predictions"]
    )
    # The first of the recipe's metrics decides what counts as right. Older versions knew relaxed accuracy alone.
    metric = str(next(iter(content.get("metrics", {})), "relaxed_accuracy"))
    return EvaluationFile(run, file, str(content["split"]), variants, questions, metric)


def scores(evaluation: EvaluationFile, variant: str) -> dict[str, Score]:
    """The score of a variant on all questions and, where there are several, on every kind of question."""
    kinds = sorted({question.kind for question in evaluation.questions} - {""}, reverse=True)
    groups = {OVERALL: list(evaluation.questions)}
    if len(kinds) > 1:
        groups |= {kind: [each for each in evaluation.questions if each.kind == kind] for kind in kinds}
    return {
        name: _score([question.answers[variant].correct for question in questions])
        for name, questions in groups.items()
    }


def _score(outcomes: Sequence[bool]) -> Score:
    correct, count = sum(outcomes), len(outcomes)
    low, high = wilson_interval(correct, count)
    return Score(correct, count, 100 * correct / count, 100 * low, 100 * high)


def pairs_of(evaluation: EvaluationFile) -> list[VariantPair]:
    """The base with every other variant, and the adapter with every one that is not the base."""
    first = "base" if "base" in evaluation.variants else evaluation.variants[0]
    pairs = [(first, variant) for variant in evaluation.variants if variant != first]
    if "adapter" in evaluation.variants and first != "adapter":
        pairs += [("adapter", name) for name in evaluation.variants if name not in (first, "adapter")]
    return [
        _pair(before, after, [(q.answers[before], q.answers[after]) for q in evaluation.questions])
        for before, after in pairs
    ]


def pair_runs(first: EvaluationFile, second: EvaluationFile, variant: str) -> VariantPair | None:
    """A variant of two runs on the questions that both were asked; None where they share none."""
    others = {(each.row, each.text, each.target): each for each in second.questions}
    shared = [
        (question.answers[variant], others[key].answers[variant])
        for question in first.questions
        if (key := (question.row, question.text, question.target)) in others
    ]
    return _pair(f"{first.run} {variant}", f"{second.run} {variant}", shared) if shared else None


def _pair(before: str, after: str, answers: Sequence[tuple[ScoredAnswer, ScoredAnswer]]) -> VariantPair:
    old, new = [each.correct for each, _ in answers], [each.correct for _, each in answers]
    gained = sum(b < a for b, a in zip(old, new, strict=True))
    lost = sum(b > a for b, a in zip(old, new, strict=True))
    return VariantPair(before, after, len(answers), gained, lost, mcnemar(old, new))
