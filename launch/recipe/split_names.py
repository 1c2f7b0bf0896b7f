"""What a recipe may call a split: a name, a slice of it, or rows that are drawn out of another split. Torch-free."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMS = "a name, name[:10%], name[90%:], name[100:200] or `name, 5 %`"
_NAME = r"(?P<name>[A-Za-z0-9_.-]+)"
_BOUND = r"(?:0|[1-9][0-9]*)%?"
_SLICE = re.compile(rf"{_NAME}(?:\[(?P<begin>{_BOUND})?:(?P<end>{_BOUND})?\])?", re.ASCII)
_DRAWN = re.compile(rf"{_NAME}\s*,\s*(?P<share>[0-9]+(?:\.[0-9]+)?)\s*%", re.ASCII)


@dataclass(frozen=True)
class SplitRows:
    """Rows of a source split.

    `begin`, `end`: bounds as written (`10%`, `200`, None: open). `share`: percent of the rows that are drawn out of the
    source, 0: none are.
    """

    name: str
    begin: str | None = None
    end: str | None = None
    share: float = 0.0

    def bounds(self, count: int) -> tuple[int, int]:
        """First row and the one after the last, of a source of `count` rows; percent are rounded to the nearest row.

        The rule of `datasets` 5 (`arrow_reader._pct_to_abs_closest`), which older runs were made with.
        """
        begin, end = _row_of(self.begin or "0", count), _row_of(self.end or "100%", count)
        return min(begin, count), min(max(begin, end), count)


def parse_split(text: str) -> SplitRows:
    """Read what a recipe calls a split. ValueError says in a few words what is wrong with it."""
    if drawn := _DRAWN.fullmatch(text):
        share = float(drawn["share"])
        if not 0 < share < 100:
            raise ValueError(f"{share:g} % of a split cannot be drawn (above 0, below 100)")
        return SplitRows(drawn["name"], share=share)
    match = _SLICE.fullmatch(text)
    if match is None:
        raise ValueError("is not a split")
    begin, end = match["begin"], match["end"]
    for bound in (begin, end):
        if bound and bound.endswith("%") and int(bound[:-1]) > 100:
            raise ValueError(f"has a bound above 100 % ({bound})")
    if end in ("0", "0%") or (begin and end and _same_unit(begin, end) and _number(begin) >= _number(end)):
        raise ValueError("holds no row")
    return SplitRows(match["name"], begin, end)


def is_split(text: str) -> bool:
    """Whether a recipe can call a split so."""
    try:
        parse_split(text)
    except ValueError:
        return False
    return True


def drawn_rows(count: int, share: float) -> NDArray[np.int64]:
    """The rows that `name, SHARE %` draws out of a split of `count` rows, in their order; int64.

    The same for every run, whatever its seed, so that runs of other seeds are validated on the same rows. Raw PCG64
    output is sorted because numpy promises that stream for ever (as `launch.planning.step_plan`).
    """
    import numpy as np

    entropy = int.from_bytes(hashlib.sha256(f"validation of {count} rows".encode()).digest(), "big")
    order = np.argsort(np.random.PCG64(entropy).random_raw(count), kind="stable").astype(np.int64)
    size = min(max(1, round(count * share / 100)), max(0, count - 1))
    return np.sort(order[:size])


def rows_of_split(split: str, count: int, drawn_out: tuple[str, ...] = ()) -> NDArray[np.int64]:
    """Row numbers in the source of what a recipe calls `split`, whose source has `count` rows; int64, ascending.

    `drawn_out`: the recipe's other splits: rows that one of them draws out of the same source are left out.
    """
    import numpy as np

    parsed = parse_split(split)
    if parsed.share:
        return drawn_rows(count, parsed.share)
    rows = np.arange(*parsed.bounds(count), dtype=np.int64)
    for other in map(parse_split, drawn_out):
        if other.share and other.name == parsed.name:
            rows = rows[~np.isin(rows, drawn_rows(count, other.share))]
    return rows


def _row_of(bound: str, count: int) -> int:
    return round(_number(bound) * count / 100.0) if bound.endswith("%") else _number(bound)


def _number(bound: str) -> int:
    return int(bound.rstrip("%"))


def _same_unit(one: str, other: str) -> bool:
    return one.endswith("%") == other.endswith("%")
