"""`trainer.model.tensors_ahead`: reads of a loading model that happen before they are asked for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import core_model_loading

from trainer.model.tensors_ahead import AHEAD, tensors_ahead


class Slice:
    """Stands for a tensor in a safetensors file; keeps which were read, and by whom."""

    def __init__(self, number: int, read: dict[int, str], error: Exception | None = None) -> None:
        self.number, self.read, self.error = number, read, error

    def __getitem__(self, _: Any) -> torch.Tensor:
        if self.error:
            raise self.error
        self.read[self.number] = threading.current_thread().name
        return torch.tensor(self.number)


def test_tensors_are_read_in_threads_in_order_and_a_bounded_number_ahead() -> None:
    read: dict[int, str] = {}
    with tensors_ahead():
        waiting = [core_model_loading.spawn_materialize(None, Slice(number, read)) for number in range(20)]
        assert not read
        for number, take in enumerate(waiting):
            assert take() == number
            assert len(read) <= number + AHEAD
    assert sorted(read) == list(range(20))
    assert all(name.startswith("tensors-ahead") for name in read.values())


def test_what_a_read_raises_reaches_whoever_takes_it_and_transformers_is_as_before() -> None:
    before, read = core_model_loading.spawn_materialize, dict[int, str]()
    with tensors_ahead():
        good = core_model_loading.spawn_materialize(None, Slice(0, read))
        bad = core_model_loading.spawn_materialize(None, Slice(1, read, torch.OutOfMemoryError("full")))
        assert good() == 0
        with pytest.raises(torch.OutOfMemoryError):
            bad()
    assert core_model_loading.spawn_materialize is before


def test_a_pool_of_transformers_own_is_left_alone() -> None:
    read: dict[int, str] = {}
    with core_model_loading.ThreadPoolExecutor(1) as pool, tensors_ahead():
        future = core_model_loading.spawn_materialize(pool, Slice(3, read))
        assert future.result() == 3
