"""The gallery of a report: which questions are shown, with the charts they are about, and every variant's answer."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from launch.errors import SamestepError
from launch.report.evaluations import AnsweredQuestion, EvaluationFile, ScoredAnswer
from launch.report.records import RunRecords
from launch.subprocesses import call_module
from launch.untrusted_files import UNREADABLE, read_bytes

MOST_QUESTIONS = 48
_IMAGE_BYTES = 2**17  # of one image; the child writes at most 64 KiB


@dataclass(frozen=True)
class Column:
    """One series of answers in the gallery."""

    run: str
    variant: str
    title: str


@dataclass(frozen=True)
class Card:
    """One question with its answers, in the columns' order (None: not asked), and the chart as a data URI."""

    question: AnsweredQuestion
    answers: tuple[ScoredAnswer | None, ...]
    image: str = ""


@dataclass(frozen=True)
class Gallery:
    """`before`, `after`: the columns that gained and lost are counted between, at first. `total`: all questions."""

    columns: tuple[Column, ...]
    cards: tuple[Card, ...]
    before: int
    after: int
    total: int
    note: str = ""

    @property
    def kinds(self) -> list[str]:
        """Kinds of question on the cards, where there are several."""
        kinds = sorted({card.question.kind for card in self.cards} - {""}, reverse=True)
        return kinds if len(kinds) > 1 else []


def make_gallery(runs: Sequence[RunRecords]) -> Gallery | None:
    """The gallery of the first run's first evaluation, beside those of the other runs; None without an evaluation.

    Charts that cannot be read are left out, and the gallery says so.
    """
    if not runs or not runs[0].evaluations:
        return None
    first = runs[0].evaluations[0]
    evaluations = [first, *filter(None, (_of_split(run, first.split) for run in runs[1:]))]
    several = len(evaluations) > 1
    columns = tuple(
        Column(each.run, variant, f"{each.run} {variant}" if several else variant)
        for each in evaluations
        for variant in each.variants
    )
    before, after = _compared(columns)
    cards = _all_cards(first, evaluations)
    shown = choose_cards(cards, before, after)
    images, note = read_images(runs[0], first.split, [card.question.row for card in shown])
    shown = [Card(card.question, card.answers, images.get(card.question.row, "")) for card in shown]
    return Gallery(columns, tuple(shown), before, after, len(cards), note)


def _of_split(run: RunRecords, split: str) -> EvaluationFile | None:
    return next((each for each in run.evaluations if each.split == split), None)


def _compared(columns: Sequence[Column]) -> tuple[int, int]:
    """The first and the last run's adapter, or the base and the adapter of one run."""
    adapters = [position for position, column in enumerate(columns) if column.variant == "adapter"]
    if len(adapters) > 1:
        return adapters[0], adapters[-1]
    after = adapters[0] if adapters else len(columns) - 1
    bases = [position for position, column in enumerate(columns) if column.variant == "base"]
    return (bases[0] if bases else 0), after


def _all_cards(first: EvaluationFile, evaluations: Sequence[EvaluationFile]) -> list[Card]:
    known = [{(q.row, q.text, q.target): q for q in each.questions} for each in evaluations]
    cards = []
    for question in first.questions:
        answers: list[ScoredAnswer | None] = []
        for each, questions in zip(evaluations, known, strict=True):
            same = questions.get((question.row, question.text, question.target))
            answers += [same.answers[variant] if same else None for variant in each.variants]
        cards.append(Card(question, tuple(answers)))
    return cards


def choose_cards(cards: Sequence[Card], before: int, after: int, most: int = MOST_QUESTIONS) -> list[Card]:
    """At most `most` cards: in turn gained, lost, wrong in both and right in both, each spread over the split."""
    groups: dict[tuple[bool, bool], list[Card]] = {}
    for card in cards:
        old, new = card.answers[before], card.answers[after]
        groups.setdefault((bool(old and old.correct), bool(new and new.correct)), []).append(card)
    order = [(False, True), (True, False), (False, False), (True, True)]
    spread = [_spread(groups.get(outcome, []), most) for outcome in order]
    in_turn = [card for card in chain.from_iterable(zip_longest(*spread)) if card is not None]
    return sorted(in_turn[:most], key=lambda card: card.question.row)


def _spread(cards: Sequence[Card], most: int) -> list[Card]:
    count = min(most, len(cards))
    return [cards[position * len(cards) // count] for position in range(count)]


def read_images(run: RunRecords, split: str, rows: Sequence[int]) -> tuple[dict[int, str], str]:
    """(data URI of the chart of each row, why there are none): read by a child of the trainer's side, which knows
    every form of dataset."""
    with tempfile.TemporaryDirectory(prefix="samestep-report-") as folder:
        arguments = ["--run-dir", str(run.run.path), "--split", split, "--output", folder]
        try:
            call_module("trainer.evaluation.chart_images", [*arguments, "--rows", ",".join(map(str, rows))])
        except SamestepError:
            return {}, "The charts could not be read; the command printed the reason."
        images = {}
        for row in rows:
            try:
                content = read_bytes(Path(folder, f"{row}.webp"), _IMAGE_BYTES)
            except UNREADABLE:
                continue
            images[row] = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
        missing = len(rows) - len(images)
        return images, f"{missing} charts could not be decoded." if missing else ""
