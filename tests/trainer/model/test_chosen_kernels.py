"""The kernels that were chosen on each rank, and what is said where ranks differ."""

from __future__ import annotations

import pytest

from trainer.model import chosen_kernels as module
from trainer.model.chosen_kernels import chosen_kernels, describe_disagreement, record_kernel


def test_the_kernel_that_was_recorded_last_is_the_one_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHOSEN", {})
    record_kernel("vision tower", "a")
    record_kernel("language model", "b")
    record_kernel("vision tower", "c")
    assert chosen_kernels() == {"language model": "b", "vision tower": "c"}


def test_ranks_with_another_kernel_than_rank_0_are_named_and_ranks_that_agree_are_not() -> None:
    same, other = {"vision tower": "a"}, {"vision tower": "b", "language model": "c"}
    assert describe_disagreement([same]) == describe_disagreement([same, same]) == ""
    assert describe_disagreement([same, same, other]) == (
        "language model of rank 2: c (rank 0: none); vision tower of rank 2: b (rank 0: a)"
    )
