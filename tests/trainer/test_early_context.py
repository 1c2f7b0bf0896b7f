"""`trainer.early_context`: who creates a CUDA context before PyTorch asks for it, and on which GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from launch.launcher_variables import EARLY_CONTEXT
from launch.local.launcher import child_environment
from launch.planning.make_plan import make_plan
from launch.planning.topology import Topology
from tests.helpers.indexes import embedded_recipe, make_index
from trainer.early_context import begin_context


class Driver:
    """Stands for libcuda.so.1 of a machine with `count` GPUs, and keeps what is retained."""

    def __init__(self, count: int) -> None:
        self.count, self.retained = count, list[int]()

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - the driver's name
        return 0 if self.count else 100

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = 1000 + number
        return 0 if number < self.count else 101

    def cuDevicePrimaryCtxRetain(self, _context: Any, device: ctypes.c_int) -> int:  # noqa: N802
        self.retained.append(device.value - 1000)
        return 0


def retained_by(monkeypatch: pytest.MonkeyPatch, driver: Driver, environment: dict[str, str]) -> list[int]:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: driver)
    if thread := begin_context(environment):
        thread.join()
    return driver.retained


def test_a_rank_creates_the_context_of_its_own_gpu_and_its_children_are_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = {EARLY_CONTEXT: "1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert retained_by(monkeypatch, Driver(2), alone) == [0]
    assert EARLY_CONTEXT not in alone
    second = {EARLY_CONTEXT: "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1"}
    assert retained_by(monkeypatch, Driver(2), second) == [1]


def test_a_launcher_passes_it_on_and_creates_none(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {EARLY_CONTEXT: "1"}
    assert retained_by(monkeypatch, Driver(1), launcher) == []
    assert launcher == {EARLY_CONTEXT: "1"}


def test_without_a_gpu_for_the_rank_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(place: str) -> dict[str, str]:
        return {EARLY_CONTEXT: "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": place}

    assert retained_by(monkeypatch, Driver(0), rank("0")) == []
    assert retained_by(monkeypatch, Driver(1), rank("1")) == []
    assert retained_by(monkeypatch, Driver(1), rank("none")) == []

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    thread = begin_context(rank("0"))
    assert thread is not None
    thread.join()


def test_a_run_asks_for_it_on_gpus_alone() -> None:
    def asked(device: str) -> str | None:
        plan = make_plan(embedded_recipe(), make_index(), Topology("ddp", 1, 2, device))
        return child_environment(plan).get(EARLY_CONTEXT)

    assert (asked("cuda"), asked("cpu")) == ("1", None)
