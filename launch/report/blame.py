"""The steps that `samestep blame` looked into, with the charts of the samples that made the most of their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.report.gallery import read_images
from launch.report.records import RunRecords
from launch.run.blamed import BlamedSample, BlamedStep

MOST_STEPS, MOST_SAMPLES = 8, 8


@dataclass(frozen=True)
class BlamedCard:
    """One sample of a step. `percent`: of the step's loss; `image`: the chart as a data URI, empty for none."""

    sample: BlamedSample
    percent: float
    image: str


@dataclass(frozen=True)
class BlamedRun:
    """The steps of one run. `note`: why charts are missing."""

    name: str
    steps: tuple[tuple[BlamedStep, tuple[BlamedCard, ...]], ...]
    note: str


def make_blamed(runs: Sequence[RunRecords]) -> list[BlamedRun]:
    """The last steps that were looked into, of every run that has some."""
    return [_of(run) for run in runs if run.blamed]


def _of(run: RunRecords) -> BlamedRun:
    steps = run.blamed[-MOST_STEPS:]
    shown = [(step, step.samples[:MOST_SAMPLES]) for step in steps]
    rows = sorted({sample.row for _, samples in shown for sample in samples})
    images, note = read_images(run, "train", rows) if rows else ({}, "")
    cards = tuple(
        (
            step,
            tuple(
                BlamedCard(each, 100 * each.share / step.loss if step.loss else 0.0, images.get(each.row, ""))
                for each in samples
            ),
        )
        for step, samples in shown
    )
    return BlamedRun(run.name, cards, note)
