"""Data workers end with the reading, and with the process."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from typing import Any

import pytest

from launch.errors import RunError
from trainer.data.loader import Loader
from trainer.data.micro_batches import Batches


def test_a_process_that_ends_in_the_middle_of_its_data_does_not_wait_for_workers_deaf_to_sigterm() -> None:
    program = (
        "import time; from trainer.data import loader, micro_batches\n"
        "class Slow(micro_batches.Batches):\n"
        "    def __len__(self): return 100\n"
        "    def batch(self, number): time.sleep(0.01); return number\n"
        "kept = iter(loader.Loader(Slow(), range(100), total=100, workers=2, pin_memory=False))\n"
        "print(next(kept), flush=True)\n"
        "raise SystemExit(7)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (7, "0\n"), ended.stderr


class _Numbered(Batches):
    def batch(self, number: int) -> Any:
        return number


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_was_begun_early_gives_every_batch_once_in_order(workers: int) -> None:
    loader = Loader(_Numbered(), range(3, 9), total=9, workers=workers, pin_memory=False)
    assert list(loader.begin()) == list(loader) == [3, 4, 5, 6, 7, 8]


class _Ones(Batches):
    def batch(self, number: int) -> Any:
        return 1


def test_workers_of_a_reading_that_was_given_up_end_when_it_is_closed() -> None:
    loader = Loader(_Ones(), range(100), total=100, workers=1, pin_memory=False)
    kept = iter(loader)  # as the traceback of an error keeps it
    assert next(kept) == 1
    before = set(multiprocessing.active_children())
    assert before
    loader.close()
    assert not before & set(multiprocessing.active_children())


def test_workers_that_were_begun_for_nothing_end_too() -> None:
    before = set(multiprocessing.active_children())
    loader = Loader(_Ones(), range(100), total=100, workers=1, pin_memory=False).begin()
    assert set(multiprocessing.active_children()) - before
    loader.close()
    assert not set(multiprocessing.active_children()) - before


class _Broken(Batches):
    def batch(self, number: int) -> Any:
        raise RunError(f"sample {number}")


def test_workers_end_with_an_error_of_the_data_while_its_traceback_is_kept() -> None:
    before = set(multiprocessing.active_children())
    loader = Loader(_Broken(), range(100), total=100, workers=1, pin_memory=False)
    with pytest.raises(RunError, match="sample 0") as kept:
        next(iter(loader))
    assert kept.tb is not None
    assert set(multiprocessing.active_children()) <= before
