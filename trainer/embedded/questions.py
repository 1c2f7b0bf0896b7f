"""The mini ChartQA that needs no download: charts of real public tables, in exactly ChartQA's schema.

The tables are real (`trainer.embedded.tables`), the questions are of ChartQA's kinds. Besides the splits the
folder holds
`facts/`: charts of further sheets with full-sentence facts for the tiny base model's own training, and the kind of each
question.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launch.atomic_files import atomic_dir
from trainer.embedded.charts import Chart, Painter, unique_charts
from trainer.embedded.tables import SPLITS, deal_sheets

Progress = Callable[[int, int], None]
"""Called with (done, total) while a builder works."""


@dataclass(frozen=True)
class Question:
    """A question of one of ChartQA's kinds; `sentence` is the same answer said at length."""

    kind: str
    query: str
    answer: str
    sentence: str
    machine: bool


def questions(chart: Chart) -> list[Question]:
    """Every question the templates can ask about `chart`."""
    return [*_counts(chart), *_extremes(chart), *_comparisons(chart), *_values(chart), *_names(chart)]


_PART = {"bar": "bar", "pie": "slice", "line": "line", "stacked": "part"}
"""What one colour of a chart is called."""


def _when(chart: Chart, tick: int) -> str:
    return f" in {chart.ticks[tick]}" if len(chart.ticks) > 1 else ""


def _counts(chart: Chart) -> Iterator[Question]:
    things = {"bar": "bars", "pie": "slices", "line": "lines", "stacked": "colours"}[chart.kind]
    number = str(len(chart.series))
    yield Question(
        "count", f"How many {things} are there in the chart?", number, f"{number} {things} are there.", False
    )
    if chart.kind == "stacked":
        number = str(len(chart.ticks))
        yield Question(
            "count", "How many bars are there in the chart?", number, f"{number} bars are there.", False
        )


def _extremes(chart: Chart) -> Iterator[Question]:
    if len(chart.series) < 2:
        return
    part = _PART[chart.kind]
    for tick in range(len(chart.ticks)):
        ranked = sorted(chart.series, key=lambda series: series.values[tick])
        when = _when(chart, tick)
        for word, series in (("largest", ranked[-1]), ("smallest", ranked[0])):
            colour, name = series.colour, series.name
            yield Question(
                "colour of extreme",
                f"What is the colour of the {word} {part}{when}?",
                colour,
                f"{colour} is the {word} {part}{when}.",
                False,
            )
            yield Question(
                "name of extreme",
                f"Which {chart.noun} has the {word} {chart.measure}{when}?",
                name,
                f"{name} has the {word} {chart.measure}{when}.",
                True,
            )
        gap = str(ranked[-1].values[tick] - ranked[0].values[tick])
        yield Question(
            "difference",
            f"What is the difference between the largest and the smallest {part}{when}?",
            gap,
            f"{gap} is the difference between the largest and the smallest {part}{when}.",
            False,
        )


def _comparisons(chart: Chart) -> Iterator[Question]:
    part = _PART[chart.kind]
    for tick in range(len(chart.ticks)):
        when = _when(chart, tick)
        for one, other in combinations(chart.series, 2):
            for left, right in ((one, other), (other, one)):
                answer = "Yes" if left.values[tick] > right.values[tick] else "No"
                relation = "larger" if answer == "Yes" else "smaller"
                yield Question(
                    "comparison by colour",
                    f"Is the {left.colour.lower()} {part} larger than the {right.colour.lower()} {part}{when}?",
                    answer,
                    f"{answer}, the {left.colour.lower()} {part} is {relation}.",
                    False,
                )
                yield Question(
                    "comparison by name",
                    f"Is the {chart.measure} of {left.name} larger than that of {right.name}{when}?",
                    answer,
                    f"{answer}, that of {left.name} is {relation}.",
                    True,
                )


def _values(chart: Chart) -> Iterator[Question]:
    part = _PART[chart.kind]
    for tick in range(len(chart.ticks)):
        when = _when(chart, tick)
        for series in chart.series:
            value, colour = str(series.values[tick]), series.colour.lower()
            yield Question(
                "value by colour",
                f"What is the value of the {colour} {part}{when}?",
                value,
                f"{value} is the value of the {colour} {part}{when}.",
                False,
            )
            yield Question(
                "value by name",
                f"What was the {chart.measure} of {series.name}{when}?",
                value,
                f"{value} was the {chart.measure} of {series.name}{when}.",
                True,
            )


def _names(chart: Chart) -> Iterator[Question]:
    part = _PART[chart.kind]
    for series in chart.series:
        yield Question(
            "colour of name",
            f"What is the colour of {series.name}?",
            series.colour,
            f"{series.colour} is the colour of {series.name}.",
            True,
        )
        yield Question(
            "name of colour",
            f"Which {chart.noun} does the {series.colour.lower()} {part} show?",
            series.name,
            f"{series.name} is what the {series.colour.lower()} {part} shows.",
            False,
        )


def caption(chart: Chart) -> str:
    """The whole chart in words, colour by colour, the largest (at the first tick) first."""
    ranked = sorted(chart.series, key=lambda series: -series.values[0])
    lines = (f"{s.colour} {s.name} {' '.join(map(str, s.values))}" for s in ranked)
    return f"A {chart.kind} chart: {', '.join(lines)}."


ROUND = (
    "count", "colour of extreme", "colour of name", "value by colour",
    "count", "colour of extreme", "colour of name", "name of extreme", "name of colour",
    "count", "colour of extreme", "colour of name", "comparison by colour", "value by name",
    "count", "colour of extreme", "comparison by name", "difference",
)  # fmt: skip
"""The kinds of a round of questions. Three in five ask for a number of things or a colour: the tiny model can learn
those in minutes, the others it would have to read for."""


def choose_questions(
    charts: Sequence[Chart], count: int, per_chart: int, seed: int
) -> list[tuple[int, Question]]:
    """`count` questions as (chart, question): kinds in the ratio of ROUND, the answers of a kind as even as they go.

    So no answer can be had from the question alone much better than by chance. At most `per_chart` on one chart,
    and every chart is asked about when `count` allows.
    """
    order = random.Random(seed)
    pools: dict[str, dict[str, list[tuple[int, Question]]]] = defaultdict(lambda: defaultdict(list))
    for place, chart in enumerate(charts):
        for question in questions(chart):
            pools[question.kind][question.answer].append((place, question))
    for answers in pools.values():
        for pool in answers.values():
            order.shuffle(pool)
    asked: Counter[int] = Counter()
    given: dict[str, Counter[str]] = defaultdict(Counter)
    chosen: list[tuple[int, Question]] = []
    while len(chosen) < count and pools:
        for kind in (kind for kind in ROUND if kind in pools):
            pick = _next_question(pools[kind], given[kind], asked, per_chart)
            if pick is None:
                pools.pop(kind)
            elif len(chosen) < count:
                chosen.append(pick)
    if len(chosen) < count:
        raise RuntimeError(f"embedded charts: {len(chosen)} questions of {count} could be asked")
    order.shuffle(chosen)
    return chosen


def _next_question(
    pool: dict[str, list[tuple[int, Question]]], given: Counter[str], asked: Counter[int], per_chart: int
) -> tuple[int, Question] | None:
    """Take the question whose answer was given least so far, on a chart asked about least."""
    for answer in sorted(pool, key=lambda answer: (given[answer], answer)):
        free = [entry for entry in pool[answer] if asked[entry[0]] < per_chart]
        if not free:
            continue
        pick = min(free[:16], key=lambda entry: asked[entry[0]])
        pool[answer].remove(pick)
        given[answer] += 1
        asked[pick[0]] += 1
        return pick
    return None


# ------------------------------------------------------------------------------------------------ the files
@dataclass(frozen=True)
class Size:
    """Charts of a split and questions asked about them."""

    charts: int
    questions: int


SIZES: Mapping[str, Size] = {"train": Size(420, 1600), "val": Size(70, 192), "test": Size(96, 256)}
FACTS_CHARTS = 1600
MOST_PER_CHART = 5

CHARTQA_SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("query", pa.string()),
        pa.field("label", pa.list_(pa.string())),
        pa.field("human_or_machine", pa.int64()),
    ],
    metadata={
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        "image": {"_type": "Image"},
                        "query": {"dtype": "string", "_type": "Value"},
                        "label": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
                        "human_or_machine": {"names": ["human", "machine"], "_type": "ClassLabel"},
                    }
                }
            }
        )
    },
)
"""ChartQA's schema as its parquet files on the hub have it (HuggingFaceM4/ChartQA)."""

FACTS_SCHEMA = pa.schema(
    [
        pa.field("image", pa.binary()),
        pa.field("caption", pa.string()),
        pa.field("questions", pa.list_(pa.string())),
        pa.field("sentences", pa.list_(pa.string())),
        pa.field("kinds", pa.list_(pa.string())),
    ]
)
"""A chart with full-sentence facts: `sentences[i]` answers `questions[i]`."""


def build_charts(folder: Path, *, charts: int | None = None, progress: Progress | None = None) -> None:
    """Write the mini ChartQA to `folder`: one parquet file a split, and `facts/`. Nothing is written when killed.

    charts: how many charts the three splits have together (default 580); all other numbers follow.
    """
    share = 1.0 if charts is None else charts / sum(size.charts for size in SIZES.values())
    dealt = deal_sheets()
    drawn = {
        split: unique_charts(dealt[split], max(4, round(size.charts * share)), seed=100 + place)
        for place, (split, size) in enumerate(SIZES.items())
    }
    facts = unique_charts(dealt["facts"], max(4, round(FACTS_CHARTS * share)), seed=200)
    total = len(facts) + sum(map(len, drawn.values()))
    images = _paint([*facts, *(chart for split in SPLITS for chart in drawn[split])], total, progress)
    with atomic_dir(folder) as aside:
        (aside / "facts").mkdir()
        pq.write_table(_facts_table(facts, images), aside / "facts" / "facts.parquet")
        kinds: dict[str, list[str]] = {}
        for place, split in enumerate(SPLITS):
            count = max(16, round(SIZES[split].questions * share))
            asked = choose_questions(drawn[split], count, MOST_PER_CHART, seed=300 + place)
            rows = [_row(images[drawn[split][chart]], question) for chart, question in asked]
            table = pa.Table.from_pylist(rows, schema=CHARTQA_SCHEMA)
            pq.write_table(table, aside / f"{split}-00000-of-00001.parquet", row_group_size=100)
            kinds[split] = [question.kind for _, question in asked]
        (aside / "facts" / "kinds.json").write_text(json.dumps(kinds, indent=0), encoding="utf-8")


def question_kinds(folder: Path, split: str) -> list[str]:
    """The kind of every question of `split` in the mini ChartQA at `folder`, in row order."""
    kinds: dict[str, list[str]] = json.loads((folder / "facts" / "kinds.json").read_text(encoding="utf-8"))
    return kinds[split]


def _paint(charts: Sequence[Chart], total: int, progress: Progress | None) -> dict[Chart, bytes]:
    painter = Painter()
    images: dict[Chart, bytes] = {}
    for chart in charts:
        images[chart] = painter.png(chart)
        if progress is not None:
            progress(len(images), total)
    return images


def _row(image: bytes, question: Question) -> dict[str, Any]:
    return {
        "image": {"bytes": image, "path": None},
        "query": question.query,
        "label": [question.answer],
        "human_or_machine": int(question.machine),
    }


def _facts_table(charts: Sequence[Chart], images: Mapping[Chart, bytes]) -> pa.Table:
    asked = [questions(chart) for chart in charts]
    columns = {
        "image": [images[chart] for chart in charts],
        "caption": [caption(chart) for chart in charts],
        "questions": [[question.query for question in group] for group in asked],
        "sentences": [[question.sentence for question in group] for group in asked],
        "kinds": [[question.kind for question in group] for group in asked],
    }
    return pa.Table.from_pydict(columns, schema=FACTS_SCHEMA)
