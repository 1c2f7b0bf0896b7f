"""Charts of sheets: chosen at random, drawn with matplotlib, readable at their small size."""

import io
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, Wedge
from matplotlib.transforms import IdentityTransform
from PIL import Image

from trainer.embedded.tables import Sheet

FloatArray = npt.NDArray[np.float32]

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
