"""The mini ChartQA that needs no download: charts of real public tables, in exactly ChartQA's schema.

The tables ship with the `plotly` package (MIT licence, `plotly.data`): Gapminder's life expectancy, population and
GDP per capita (gapminder.org, CC BY 4.0), the votes of the 2013 Montreal mayoral election (City of Montreal open
data, CC BY 4.0), weekly stock prices of 2018 and 2019, restaurant bills (`tips`, R package reshape2, MIT) and the
medals of short-track speed skating. Values are rounded to whole numbers; nothing is made up.

A table is cut into sheets (say: life expectancy in Asia, 1962 to 1972), and a sheet belongs to one split, so no
cell of a test chart is seen in training. Besides the splits the folder holds `facts/`: charts of further sheets with
full-sentence facts for the tiny base model's own training, and the kind of each question.
"""

import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, Wedge
from matplotlib.transforms import IdentityTransform
from PIL import Image

from launch.folders import published

FloatArray = npt.NDArray[np.float32]

Progress = Callable[[int, int], None]
"""Called with (done, total) while a builder works."""

WIDTH, HEIGHT, DPI = 168, 112, 100
"""Pixels of every chart: 6 x 4 visual tokens of 28 x 28."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "Red": (235, 70, 70),
    "Green": (70, 235, 70),
    "Blue": (70, 70, 235),
    "Cyan": (70, 235, 235),
    "Magenta": (235, 70, 235),
    "Yellow": (235, 235, 70),
}
"""The palette. Any permutation of the channels R, G, B maps it onto itself (the base's training uses that)."""

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sheet:
    """A piece of a real table: `values[row][column]`, whole numbers from 1 to 999."""

    source: str
    measure: str  # "population in millions"
    noun: str  # what a row is: "country"
    title: str
    columns: tuple[str, ...]
    values: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Series:
    """One colour of a chart: a bar, a slice, a line or the same part of every stacked bar."""

    name: str
    colour: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Chart:
    """What is drawn. `ticks` are the columns shown: one for bar and pie, several for line and stacked bar."""

    kind: str  # bar | stacked | line | pie
    title: str
    measure: str
    noun: str
    ticks: tuple[str, ...]
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Question:
    """A question of one of ChartQA's kinds; `sentence` is the same answer said at length."""

    kind: str
    query: str
    answer: str
    sentence: str
    machine: bool


# ------------------------------------------------------------------------------------------------ the tables
def sheets() -> list[Sheet]:
    """Every sheet of every table, in a fixed order."""
    return [*_gapminder(), *_election(), *_stocks(), *_tips(), *_medals()]


def _rows(table: str) -> list[dict[str, Any]]:
    import plotly.data  # here: half a second that only a build pays

    rows: list[dict[str, Any]] = getattr(plotly.data, table)(return_type="pyarrow").to_pylist()
    return rows


def _sheet(source: str, measure: str, noun: str, title: str, cells: Mapping[tuple[str, str], float]) -> Sheet:
    """A sheet of the rounded `cells[(row, column)]`; rows with a value outside 1..999 are left out."""
    columns = tuple(dict.fromkeys(column for _, column in cells))
    values = {
        row: tuple(round(cells.get((row, column), 0)) for column in columns)
        for row in dict.fromkeys(row for row, _ in cells)
    }
    kept = {row: line for row, line in values.items() if all(1 <= value <= 999 for value in line)}
    return Sheet(source, measure, noun, title, columns, kept)


def _gapminder() -> Iterator[Sheet]:
    measures = (
        ("lifeExp", 1.0, "life expectancy", "Life expectancy (years)"),
        ("pop", 1e6, "population in millions", "Population (millions)"),
        ("gdpPercap", 1e3, "income in thousands", "GDP per person ($1000)"),
    )
    rows = [row for row in _rows("gapminder") if len(row["country"]) <= 6]
    years = sorted({row["year"] for row in rows})
    for continent in sorted({row["continent"] for row in rows} - {"Oceania"}):
        for first in range(0, len(years), 3):
            block = [r for r in rows if r["continent"] == continent and r["year"] in years[first : first + 3]]
            for key, scale, measure, title in measures:
                cells = {(r["country"], str(r["year"])): r[key] / scale for r in block}
                yield _sheet("gapminder", measure, "country", title, cells)


def _election() -> Iterator[Sheet]:
    for row in _rows("election"):
        number = row["district"].split("-")[0]
        cells = {(name, "2013"): 100 * row[name] / row["total"] for name in ("Coderre", "Bergeron", "Joly")}
        yield _sheet("election", "share of the votes", "candidate", f"Votes (%), district {number}", cells)


def _stocks() -> Iterator[Sheet]:
    firsts = {row["date"][:7]: row for row in reversed(_rows("stocks"))}  # the first week of each month
    months = sorted(firsts)
    names = {
        "GOOG": "Google",
        "AAPL": "Apple",
        "AMZN": "Amazon",
        "FB": "FB",
        "NFLX": "Netflix",
        "MSFT": "MSFT",
    }
    for start in range(0, len(months) - 2, 3):
        cells = {
            (name, f"{month[5:]}/{month[2:4]}"): 100 * firsts[month][key]
            for key, name in names.items()
            for month in months[start : start + 3]
        }
        yield _sheet("stocks", "stock price", "company", "Stock price (Jan 2018 = 100)", cells)


def _tips() -> Iterator[Sheet]:
    rows = _rows("tips")
    for by in ("sex", "smoker", "time"):
        groups = sorted({row[by] for row in rows})
        bills: dict[tuple[str, str], list[float]] = defaultdict(list)
        for day in ("Thur", "Fri", "Sat", "Sun"):
            for group in groups:
                bills[day, group] = [r["total_bill"] for r in rows if r["day"] == day and r[by] == group]
        labels = {"sex": "", "smoker": "smoker: ", "time": ""}
        mean = {(d, labels[by] + g): float(np.mean(b)) if b else 0.0 for (d, g), b in bills.items()}
        count = {(d, labels[by] + g): float(len(b)) for (d, g), b in bills.items()}
        yield _sheet("tips", "average bill", "day", "Average bill ($)", mean)
        yield _sheet("tips", "number of bills", "day", "Number of bills", count)


def _medals() -> Iterator[Sheet]:
    short = {"South Korea": "Korea"}
    rows = _rows("medals_wide")
    for medal in ("gold", "silver", "bronze"):
        cells = {(short.get(r["nation"], r["nation"]), medal): float(r[medal]) for r in rows}
        yield _sheet("medals", f"number of {medal} medals", "nation", f"{medal.title()} medals", cells)


def deal_sheets(seed: int = 0) -> dict[str, list[Sheet]]:
    """Each sheet to one of "facts", "train", "val" and "test", so that every split sees every large table."""
    shares = ("test", "facts", "train", "facts", "facts", "val", "facts", "train", "facts", "facts")
    order = random.Random(seed)
    by_measure: dict[tuple[str, str], list[Sheet]] = defaultdict(list)
    for sheet in sheets():
        by_measure[sheet.source, sheet.measure].append(sheet)
    dealt: dict[str, list[Sheet]] = {"facts": [], "train": [], "val": [], "test": []}
    place = 0
    for group in by_measure.values():
        for sheet in order.sample(group, len(group)):
            large = sheet.source in ("gapminder", "election", "stocks")
            dealt[shares[place % len(shares)] if large else ("facts", "train")[place % 2]].append(sheet)
            place += 1
    return dealt


# ------------------------------------------------------------------------------------------------ the charts
_SUMMABLE = ("population in millions", "share of the votes", "number of bills")
"""Measures whose parts make a whole: only they become pies and stacked bars."""

_SERIES = {"bar": (2, 5), "pie": (2, 4), "line": (1, 3), "stacked": (2, 3)}
"""Fewest and most series of each kind of chart."""

_SHARES = {"gapminder": 12, "election": 3, "stocks": 3, "tips": 2, "medals": 1}
"""How often a table is drawn from, relative to the others."""


def random_chart(sheet: Sheet, order: random.Random) -> Chart | None:
    """A readable chart of `sheet`, or None when no fitting values were found."""
    kinds = ["bar", "pie", "pie"] if sheet.measure in _SUMMABLE else ["bar", "bar"]
    if len(sheet.columns) > 1:
        kinds += ["line", "stacked", "stacked"] if sheet.measure in _SUMMABLE else ["line"]
    kind = order.choice(kinds)
    fewest, most = _SERIES[kind]
    size = order.randint(fewest, most)
    if len(sheet.values) < size:
        return None
    for _ in range(40):
        chart = _draw_lots(sheet, kind, size, order)
        if _readable(chart):
            return chart
    return None


def _draw_lots(sheet: Sheet, kind: str, size: int, order: random.Random) -> Chart:
    """A chart of `size` random rows of `sheet` in random colours: one column, or all but at most one."""
    names = order.sample(sorted(sheet.values), size)
    colours = order.sample(sorted(COLOURS), size)
    columns = list(range(len(sheet.columns)))
    if kind in ("bar", "pie"):
        columns = [order.choice(columns)]
    elif len(columns) > 2 and order.random() < 0.5:
        columns.remove(order.choice(columns))
    ticks = tuple(sheet.columns[column] for column in columns)
    series = tuple(
        Series(name, colour, tuple(sheet.values[name][column] for column in columns))
        for name, colour in zip(names, colours, strict=True)
    )
    single = len(ticks) == 1 and sheet.source in ("gapminder", "stocks", "tips")
    title = f"{sheet.title}, {ticks[0]}" if single else sheet.title
    return Chart(kind, title, sheet.measure, sheet.noun, ticks, series)


def _sums(chart: Chart) -> list[int]:
    """The height of each stacked bar."""
    return [sum(series.values[tick] for series in chart.series) for tick in range(len(chart.ticks))]


def _readable(chart: Chart) -> bool:
    """Values at one tick differ clearly; slices and stacked parts are large enough for their label."""
    gap = {"bar": 0.07, "pie": 0.07, "stacked": 0.07, "line": 0.24}[chart.kind]
    for tick in range(len(chart.ticks)):
        values = sorted(series.values[tick] for series in chart.series)
        if any(above - below < gap * values[-1] for below, above in pairwise(values)):
            return False
    smallest = min(min(series.values) for series in chart.series)
    share = {"pie": 0.08, "stacked": 0.14}.get(chart.kind, 0.0)
    return smallest >= share * max(_sums(chart))


def unique_charts(pool: Sequence[Sheet], count: int, seed: int) -> list[Chart]:
    """`count` different charts of the sheets in `pool`."""
    order = random.Random(seed)
    by_source: dict[str, list[Sheet]] = defaultdict(list)
    for sheet in pool:
        by_source[sheet.source].append(sheet)
    sources = sorted(by_source)
    weights = [_SHARES[source] for source in sources]
    found: dict[Chart, None] = {}
    for _ in range(50 * count):
        chart = random_chart(order.choice(by_source[order.choices(sources, weights)[0]]), order)
        if chart is not None:
            found[chart] = None
        if len(found) == count:
            return list(found)
    raise RuntimeError(f"embedded charts: only {len(found)} different charts of {count} could be made")


class Painter:
    """Draws charts in pixel coordinates on one figure without axes; texts are drawn once and stamped from then on.

    With matplotlib's axes and with every text laid out anew a chart takes 40 ms, so 3.
    """

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self.stamps: list[tuple[FloatArray, int, int]] = []

    def png(self, chart: Chart) -> bytes:
        """The chart as a PNG of WIDTH x HEIGHT pixels; equal charts give equal bytes (no date, no metadata)."""
        self.figure.clear()
        self.stamps.clear()
        self.text(WIDTH / 2, HEIGHT - 6, chart.title, size=8)
        draw = {"bar": _draw_bars, "stacked": _draw_stacked, "line": _draw_lines, "pie": _draw_pie}
        draw[chart.kind](self, chart)
        self.canvas.draw()
        pixels = np.asarray(self.canvas.buffer_rgba())[:, :, :3].astype(np.float32)
        for ink, left, top in self.stamps:
            left, top = max(0, left), max(0, top)
            place = pixels[top : top + ink.shape[0], left : left + ink.shape[1]]
            place *= 1 - ink[: place.shape[0], : place.shape[1], None]
        out = io.BytesIO()
        Image.fromarray(pixels.round().astype(np.uint8)).save(out, format="PNG", compress_level=3)
        return out.getvalue()

    def add(self, artist: Artist) -> None:
        artist.set_transform(IdentityTransform())
        self.figure.add_artist(artist)

    def text(
        self, x: float, y: float, text: str, size: float, bold: bool = False, align: str = "center"
    ) -> None:
        """`text` in black, centred on height `y`; `size` in pixels. It lies over every shape."""
        ink = _ink(text, size, bold)
        left = x - ink.shape[1] / 2 if align == "center" else x
        self.stamps.append((ink, round(left), round(HEIGHT - y - ink.shape[0] / 2)))

    def bar(self, middle: float, bottom: float, width: float, height: float, colour: str) -> None:
        corner = (middle - width / 2, bottom)
        self.add(Rectangle(corner, width, height, facecolor=_rgb(colour), linewidth=0))

    def floor(self, right: float) -> None:
        """The horizontal axis, from the left edge to `right`."""
        self.add(Line2D([2, right], [_FLOOR, _FLOOR], color="black", linewidth=0.8))

    def legend(self, chart: Chart) -> None:
        """Colour squares with names in a column on the right."""
        for place, series in enumerate(chart.series):
            y = HEIGHT - 28 - 18 * place
            self.bar(117, y - 5, 10, 10, series.colour)
            self.text(124, y, series.name, size=9.5, align="left")


_FLOOR, _ROOM = 16.0, 63.0
"""Baseline of the plot area above the bottom and the height of its largest value, in pixels."""


@cache
def _ink(text: str, size: float, bold: bool) -> FloatArray:
    """How black each pixel of `text` is, 0 to 1, cropped to its width; float32 [24, width]."""
    figure = Figure(figsize=((len(text) + 2) * size / DPI, 24 / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    font = FontProperties(family="DejaVu Sans", size=size * 72 / DPI, weight="bold" if bold else "normal")
    figure.text(
        0.5, 0.5, text, fontproperties=font, ha="center", va="center_baseline"
    )  # a font of matplotlib's own
    canvas.draw()
    ink: FloatArray = 1 - np.asarray(canvas.buffer_rgba())[:, :, 0].astype(np.float32) / np.float32(255)
    columns = np.flatnonzero(ink.any(axis=0))
    return ink[:, columns[0] : columns[-1] + 1]


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = COLOURS[colour]
    return red / 255, green / 255, blue / 255


def _draw_bars(painter: Painter, chart: Chart) -> None:
    slot = (WIDTH - 8) / len(chart.series)
    scale = _ROOM / max(series.values[0] for series in chart.series)
    painter.floor(WIDTH - 2)
    for place, series in enumerate(chart.series):
        middle, height = 4 + slot * (place + 0.5), series.values[0] * scale
        painter.bar(middle, _FLOOR, min(0.66 * slot, 30), height, series.colour)
        painter.text(middle, _FLOOR + height + 7, str(series.values[0]), size=12, bold=True)
        painter.text(middle, 8, series.name, size=9.5 if len(chart.series) < 5 else 8)


def _draw_stacked(painter: Painter, chart: Chart) -> None:
    painter.legend(chart)
    slot = 102 / len(chart.ticks)
    scale = (_ROOM + 8) / max(_sums(chart))
    painter.floor(106)
    for tick, name in enumerate(chart.ticks):
        middle, bottom = 4 + slot * (tick + 0.5), _FLOOR
        painter.text(middle, 8, name, size=9)
        for series in chart.series:
            height = series.values[tick] * scale
            painter.bar(middle, bottom, min(0.74 * slot, 34), height, series.colour)
            painter.text(middle, bottom + height / 2, str(series.values[tick]), size=11, bold=True)
            bottom += height


def _draw_lines(painter: Painter, chart: Chart) -> None:
    painter.legend(chart)
    slot = 102 / len(chart.ticks)
    scale = _ROOM / max(max(series.values) for series in chart.series)
    painter.floor(106)
    places = [4 + slot * (tick + 0.5) for tick in range(len(chart.ticks))]
    for place, name in zip(places, chart.ticks, strict=True):
        painter.text(place, 8, name, size=9)
    for series in chart.series:
        heights = [_FLOOR + value * scale for value in series.values]
        painter.add(Line2D(places, heights, color=_rgb(series.colour), linewidth=3, marker="o", markersize=5))
        for place, height, value in zip(places, heights, series.values, strict=True):
            painter.text(place, height + 8, str(value), size=10, bold=True)


def _draw_pie(painter: Painter, chart: Chart) -> None:
    painter.legend(chart)
    x, y, radius = 54.0, 49.0, 46.0
    whole = sum(series.values[0] for series in chart.series)
    after = 90.0  # degrees; clockwise from the top
    for series in chart.series:
        before = after
        after -= 360 * series.values[0] / whole
        painter.add(Wedge((x, y), radius, after, before, facecolor=_rgb(series.colour), linewidth=0))
        middle = math.radians((before + after) / 2)
        label_x, label_y = x + 0.66 * radius * math.cos(middle), y + 0.66 * radius * math.sin(middle)
        painter.text(label_x, label_y, str(series.values[0]), size=12, bold=True)


# ------------------------------------------------------------------------------------------------ the questions
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
    with published(folder) as aside:
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
