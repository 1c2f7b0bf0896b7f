"""Which micro-batches are computed twice, and who is named when the two differ."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from trainer.loop.recheck import (
    Apart,
    Computed,
    Report,
    describe_fault,
    differences_of,
    limits_of,
)

LIMITS = Apart(1e-5, 1e-4)
GOOD, WRONG, EMPTY = (Computed(loss, [[value] * 5]) for loss, value in ((1.0, 2.0), (1.5, 3.0), (0.0, 0.0)))


def _reports(*pairs: tuple[Computed | None, Computed]) -> list[Report]:
    """Of ranks on hosts n0, n1, ...: what each got of its own micro-batch and of the one before."""
    return [Report(own, again, 0.1, f"host n{rank}, CPU") for rank, (own, again) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        (
            _reports((GOOD, GOOD), (WRONG, WRONG), (GOOD, GOOD)),
            "rank 1 (host n1, CPU) computed otherwise than the ranks on both sides (loss 1 on rank 0 and 1.5 on rank 1",
        ),
        (
            _reports((GOOD, GOOD), (GOOD, GOOD), (WRONG, WRONG)),
            "rank 2 (host n2, CPU) computed otherwise than the ranks on both sides",
        ),
        (
            _reports((GOOD, GOOD), (WRONG, GOOD), (GOOD, GOOD)),  # once
            "rank 1 (host n1, CPU) and rank 2 (host n2, CPU) computed the same micro-batch otherwise, and one of them",
        ),
        (
            _reports((GOOD, GOOD), (EMPTY, WRONG), (GOOD, EMPTY)),  # its own is a filler, which tells nothing
            "rank 0 (host n0, CPU) and rank 1 (host n1, CPU) computed the same micro-batch otherwise, and one of them",
        ),
        (
            _reports((GOOD, GOOD), (WRONG, WRONG)),
            "rank 0 (host n0, CPU) and rank 1 (host n1, CPU) computed the same micro-batch otherwise, and one of them",
        ),
        (
            _reports((GOOD, WRONG)),
            "rank 0 (host n0, CPU) computed the same micro-batch otherwise the second time",
        ),
    ],
)
def test_the_rank_that_differs_from_both_neighbours_is_named_or_else_both_that_differ(
    reports: list[Report], words: str
) -> None:
    said = describe_fault(reports, LIMITS, "step 3, micro-batch 1 of 2")
    assert said.startswith(f"step 3, micro-batch 1 of 2: {words}")
    assert "rounding explains 1e-05 and 1e-04" in said


def test_rounding_fillers_and_ranks_without_memory_are_no_difference_and_half_a_nan_is_one() -> None:
    sure, almost = (Computed(loss, [[2.0] * 5]) for loss in (1e-7, 2e-7))  # of a tenth of the step's tokens
    nothing = Computed(math.nan, [[math.nan] * 5])
    apart = differences_of(_reports((sure, EMPTY), (EMPTY, almost), (None, EMPTY), (nothing, GOOD)))
    assert not any(each.is_beyond(LIMITS) for each in apart[:3])
    assert apart[0].loss == pytest.approx(1e-6)
    assert apart[3] == Apart(math.inf, math.inf)
    assert differences_of(_reports((nothing, nothing))) == [Apart()]  # the step itself stops the run


def test_the_limits_are_those_of_diff_and_replay_in_float32_and_measured_ones_in_16_bits() -> None:
    def limits(dtype: str, device: str) -> Apart:
        return limits_of(SimpleNamespace(compute_dtype=dtype, device=device))  # type: ignore[arg-type]

    assert limits("float32", "cpu").loss == pytest.approx(1e-5)
    assert limits("float32", "cpu").gradients == pytest.approx(1e-4)
    assert limits("bfloat16", "cuda") == Apart(5e-3, 5e-2)
