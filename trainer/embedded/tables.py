"""The real public tables behind the embedded charts, cut into sheets that are dealt to the splits.

The tables ship with the `plotly` package (MIT licence, `plotly.data`): Gapminder's life expectancy, population and
GDP per capita (gapminder.org, CC BY 4.0), the votes of the 2013 Montreal mayoral election (City of Montreal open
data, CC BY 4.0), weekly stock prices of 2018 and 2019, restaurant bills (`tips`, R package reshape2, MIT) and the
medals of short-track speed skating. Values are rounded to whole numbers; nothing is made up.

A table is cut into sheets (say: life expectancy in Asia, 1962 to 1972), and a sheet belongs to one split, so no cell of
a test chart is seen in training.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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
