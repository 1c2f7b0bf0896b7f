"""What a count of right answers is worth: intervals of a share, and the test of two paired series.

Two formulas; statsmodels, which has both, would be installed for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_NORMAL_95 = 1.959963984540054  # quantile 0.975 of the standard normal distribution


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` observations (at least 1), both ends in [0, 1].

    Unlike the normal approximation it is not empty for 0 or `count` successes (E. B. Wilson, 1927).
    """
    share, z2 = successes / count, _NORMAL_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Exact ends where rounding would leave 0 or 1 outside.
    return (centre - half if successes else 0.0), (centre + half if successes < count else 1.0)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The probability of a change at least as one-sided as this one, if the two were equally good.

    Exact two-sided McNemar test: only questions whose outcome changed count, and each would have been as
    likely to change for the better as for the worse. `before` and `after` hold the outcomes of the same
    questions in the same order; ValueError when their lengths differ.
    """
    better = sum(b < a for b, a in zip(before, after, strict=True))
    worse = sum(b > a for b, a in zip(before, after, strict=True))
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**changed))
