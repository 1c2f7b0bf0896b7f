"""The curves of a report as plotly's traces: data only, the page gives them their colours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from launch.report.records import RunRecords, number
from launch.units import GIB

POINTS = 1500
"""The most points of one curve; of longer runs each point is the mean of several steps."""
_SMOOTHING = 0.9  # of the exponential moving average


def curves(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """Charts with a title, a unit and their traces, without those that no run has figures for.

    A trace: name, x, y, the run's position (for its colour) and a style (line, faint, dots).
    """
    charts = [
        _chart("Training loss", "loss per target token", runs, _loss_traces),
        _chart("Validation loss", "loss per target token", runs, _validation("loss")),
        _chart("Validation accuracy", "percent", runs, _validation("accuracy")),
        _chart("Learning rate", "", runs, _plain("learning_rate")),
        _chart("Gradient norm", "before clipping", runs, _plain("grad_norm")),
        _chart("Speed", "tokens per second", runs, _speed_traces),
        _chart("Memory", "GiB of rank 0", runs, _memory_traces),
    ]
    return [chart for chart in charts if chart["traces"]]


Traces = Callable[[RunRecords], list[dict[str, Any]]]


def _chart(title: str, unit: str, runs: Sequence[RunRecords], traces_of: Traces) -> dict[str, Any]:
    several = len(runs) > 1
    traces = []
    for position, run in enumerate(runs):
        for trace in traces_of(run):
            name = " ".join(filter(None, [run.name if several else "", trace["name"]]))
            traces.append({**trace, "name": name, "run": position})
    return {"title": title, "unit": unit, "traces": traces}


def _plain(key: str) -> Traces:
    def traces(run: RunRecords) -> list[dict[str, Any]]:
        points = _points(run.steps, lambda step: number(step, key))
        return [_trace("", points, "line")] if points else []

    return traces


def _loss_traces(run: RunRecords) -> list[dict[str, Any]]:
    points = _points(run.steps, lambda step: number(step, "loss"))
    if not points:
        return []
    smoothed = list(zip([x for x, _ in points], _smoothed([y for _, y in points]), strict=True))
    return [_trace("each step", points, "faint"), _trace("smoothed", smoothed, "line")]


def _validation(key: str) -> Traces:
    def traces(run: RunRecords) -> list[dict[str, Any]]:
        points = _points(run.losses, lambda line: number(line, key))
        return [_trace("", points, "dots")] if points else []

    return traces


def _speed_traces(run: RunRecords) -> list[dict[str, Any]]:
    points = _points(run.steps, tokens_per_second)
    return [_trace("", points, "line")] if points else []


def _memory_traces(run: RunRecords) -> list[dict[str, Any]]:
    traces = []
    for key, name, style in (
        ("memory_allocated", "allocated", "line"),
        ("memory_reserved", "reserved", "faint"),
    ):
        points = _points(run.steps, lambda step, key=key: _gib(number(step, key)))  # type: ignore[misc]
        if points:
            traces.append(_trace(name, points, style))
    return traces


def _gib(size: float | None) -> float | None:
    return None if size is None else size / GIB


def tokens_per_second(step: dict[str, Any]) -> float | None:
    """Text and image tokens of a step over its seconds; None where either is not known."""
    tokens, seconds = number(step, "tokens"), number(step, "seconds")
    return tokens / seconds if tokens is not None and seconds else None


def median_speed(steps: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per second of the median step: the first one of an attempt says little."""
    speeds = [speed for step in steps if (speed := tokens_per_second(step)) is not None]
    return statistics.median(speeds) if speeds else None


def _trace(name: str, points: Sequence[tuple[float, float]], style: str) -> dict[str, Any]:
    return {
        "name": name,
        "x": [x for x, _ in points],
        "y": [float(f"{y:.6g}") for _, y in points],
        "style": style,
    }


def _points(
    lines: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]
) -> list[tuple[float, float]]:
    """(step, value) of the lines that have one, at most `POINTS`: then means of equally many steps."""
    known = [(float(line["step"]), number) for line in lines if (number := value(line)) is not None]
    width = math.ceil(len(known) / POINTS)
    if width <= 1:
        return known
    groups = [known[begin : begin + width] for begin in range(0, len(known), width)]
    return [(group[-1][0], statistics.fmean(y for _, y in group)) for group in groups]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        smoothed.append(average / weight)
    return smoothed
