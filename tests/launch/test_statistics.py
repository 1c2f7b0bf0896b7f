"""Intervals of a share."""

import math

import pytest

from launch.statistics import wilson_interval


@pytest.mark.parametrize(("right", "count"), [(94, 256), (1, 3), (2499, 2500), (0, 10), (10, 10)])
def test_the_ends_of_the_interval_are_the_shares_that_a_score_test_would_just_not_reject(
    right: int, count: int
) -> None:
    interval = wilson_interval(right, count)
    for end in interval:
        distance = abs(right / count - end)
        assert distance == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), abs=1e-6)
    assert interval[0] <= right / count <= interval[1]
    assert interval[0] < interval[1]
