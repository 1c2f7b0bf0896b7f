"""The garbage collector runs when it is called, and only while the training lasts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tests.conftest import UNFREEZE
from trainer.garbage import GarbageBetweenSteps


@pytest.fixture(autouse=True)
def as_it_is_outside_of_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left out of collections at first, and what a training left out is not in the end."""
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_cycles_are_collected_once_a_step_and_at_no_other_time() -> None:
    garbage = GarbageBetweenSteps()
    with garbage:
        assert not gc.isenabled()
        for _ in range(2):
            gone = weakref.ref(Cycle())
            assert [[] for _ in range(100_000)]  # enough for a collection of its own
            assert gone() is not None
            garbage.collect()
            assert gone() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_collector_is_on_again_after_a_failed_training() -> None:
    with pytest.raises(RuntimeError), GarbageBetweenSteps():
        raise RuntimeError
    assert gc.isenabled()


def test_outside_of_the_training_nothing_is_collected() -> None:
    gc.disable()
    try:
        gone = weakref.ref(Cycle())
        GarbageBetweenSteps().collect()
        assert gone() is not None
    finally:
        gc.enable()
