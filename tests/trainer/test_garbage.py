"""The garbage collector runs when it is called, and only while the training lasts."""

from __future__ import annotations

import gc
import weakref

import pytest

from trainer.garbage import GarbageBetweenSteps


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
