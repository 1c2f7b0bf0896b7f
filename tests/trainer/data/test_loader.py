"""Data workers end with the reading, and with the process."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from launch.errors import RunError
from tests.helpers.distributed.forked import forked_program
from trainer.data import worker_transport
from trainer.data.loader import Loader, lost_worker
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
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (7, "0\n"), ended.stderr


class _Numbered(Batches):
    def batch(self, number: int) -> Any:
        return number


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_was_begun_early_gives_every_batch_once_in_order(workers: int) -> None:
    loader = Loader(_Numbered(), range(3, 9), total=9, workers=workers, pin_memory=False)
    assert list(loader.begin()) == list(loader) == [3, 4, 5, 6, 7, 8]


class _NumberedUpTo4(_Numbered):
    def batch(self, number: int) -> Any:
        if number == 4:
            raise RunError("sample 4")
        return number


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_read_ahead_come_prepared_in_their_place_and_so_do_their_errors(
    workers: int,
) -> None:
    loader = Loader(_NumberedUpTo4(), range(9), total=9, workers=workers, pin_memory=False)
    reading = iter(loader)
    seen: list[Any] = []
    for _ in range(2):
        seen.append(next(reading))
        loader.read_ahead(lambda batch: -batch)  # type: ignore[operator, arg-type, return-value]
        loader.read_ahead(lambda _: pytest.fail("a second one was read ahead"))
    assert [*seen, next(reading), next(reading)] == [0, -1, -2, 3]
    loader.read_ahead(lambda batch: batch)  # a batch that is read ahead for the step after fails then
    with pytest.raises(RunError, match="sample 4"):
        next(reading)
    loader.read_ahead(lambda _: pytest.fail("there is none"))
    assert list(reading) == []


def test_what_fails_in_preparing_a_batch_is_raised_where_the_batch_is_asked_for() -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("no pinned memory")

    loader = Loader(_Numbered(), range(2), total=2, workers=0, pin_memory=False)
    reading = iter(loader)
    loader.read_ahead(fail)
    with pytest.raises(RuntimeError, match="no pinned memory"):
        next(reading)


def test_a_batch_that_was_read_ahead_can_be_replaced_and_nothing_else_is() -> None:
    loader = Loader(_NumberedUpTo4(), range(3, 9), total=9, workers=0, pin_memory=False)
    loader.change_ready(lambda _: pytest.fail("nothing was begun"))
    reading = iter(loader)
    loader.read_ahead(lambda batch: batch)
    loader.change_ready(lambda batch: -batch)  # type: ignore[operator, arg-type, return-value]
    assert next(reading) == -3
    loader.change_ready(lambda _: pytest.fail("none was read ahead"))
    loader.read_ahead(lambda batch: batch)
    loader.change_ready(lambda _: pytest.fail("an error is no batch"))
    with pytest.raises(RunError, match="sample 4"):
        next(reading)
    loader.close()


class _Ones(Batches):
    def batch(self, number: int) -> Any:
        return 1


def test_workers_of_a_reading_that_was_given_up_end_when_it_is_closed() -> None:
    loader = Loader(_Ones(), range(100), total=100, workers=1, pin_memory=False)
    kept = iter(loader)  # as the traceback of an error keeps it
    assert next(kept) == 1
    loader.read_ahead(lambda batch: batch)
    before = set(multiprocessing.active_children())
    assert before
    loader.close()
    assert not before & set(multiprocessing.active_children())
    assert list(kept) == []


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


class _Tensors(Batches):
    """Batches of 0.4 MB; number 2 of the `odd` ones can go through no queue."""

    odd = False

    def batch(self, number: int) -> Any:
        if self.odd and number == 2:
            return lambda: None
        return {"inputs": {"x": torch.full((10, 10_000), float(number)), "none": torch.empty(0, 3)}}


class _Unsendable(_Tensors):
    odd = True


def _values(batches: Iterable[Any]) -> list[float]:
    return [float(batch["inputs"]["x"][3, 7]) for batch in batches]


def test_batches_that_find_no_shared_memory_come_through_the_pipe(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planned = Loader(_Tensors(), range(6), total=6, workers=2, pin_memory=False, by_pipe=True)
    assert _values(planned) == [0, 1, 2, 3, 4, 5]

    def full(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the workers are forked
    unplanned = Loader(_Tensors(), range(6), total=6, workers=2, pin_memory=False)
    assert _values(unplanned) == [0, 1, 2, 3, 4, 5]
    assert capfd.readouterr().err.count("a data worker goes on through its pipe") == 2


def test_a_file_size_limit_loses_no_batch() -> None:
    program = (
        "import resource; from tests.trainer.data.test_loader import _Tensors, _values\n"
        "from trainer.data.loader import Loader\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "print(_values(Loader(_Tensors(), range(4), total=4, workers=1, pin_memory=False)))"
    )
    ended = forked_program(program)
    assert ended.stdout == "[0.0, 1.0, 2.0, 3.0]\n", ended.stderr


def _read_until_lost(batches: str, event: str = "") -> subprocess.CompletedProcess[str]:
    """Read in a process of its own, which loses PyTorch's handler of SIGCHLD; `event`: after the workers began."""
    program = f"""
import multiprocessing
from launch.errors import RunError
from tests.trainer.data.test_loader import *
from tests.trainer.data.test_loader import _Ones, _Unsendable
reading = Loader({batches}, range(10_000), total=10_000, workers=2, pin_memory=False).begin()
workers = multiprocessing.active_children()
{event}
try:
    list(reading)
except RunError as error:
    [(worker.kill(), worker.join()) for worker in workers]
    print(error)
"""
    return forked_program(program)


def test_a_batch_that_is_lost_ends_the_reading_with_what_there_is_of_shared_memory() -> None:
    ended = _read_until_lost("_Unsendable()")
    assert re.search(
        r"data workers: a micro-batch is lost .*/dev/shm has .* MB free.*--shm-size", ended.stdout
    ), ended.stderr
    assert "cannot hand over a micro-batch" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_that_is_killed_ends_the_reading() -> None:
    ended = _read_until_lost("_Ones()", "workers[0].kill()")
    assert re.search(r"a micro-batch is lost .*(killed|exited unexpectedly)", ended.stdout), ended.stderr
    assert not ended.stderr


def test_a_worker_that_is_killed_while_its_rank_computes_is_said_in_words() -> None:
    loader = Loader(_Ones(), range(10_000), total=10_000, workers=1, pin_memory=False)
    kept = iter(loader)
    next(kept)
    workers = multiprocessing.active_children()
    threading.Timer(1, lambda: [worker.kill() for worker in workers]).start()
    with pytest.raises(RuntimeError) as raised:
        time.sleep(60)  # PyTorch raises it here
    lost = lost_worker(raised.value)
    assert lost is not None
    assert "a micro-batch is lost (DataLoader worker" in str(lost)
    assert lost_worker(RuntimeError("of a batch")) is None
    loader.close()


def test_small_shared_memory_is_measured_and_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(free: float, workers: int = 4) -> worker_transport.Way:
        monkeypatch.setattr(worker_transport, "free_shared_memory", lambda: (int(free), 64_000_000))
        return worker_transport.choose_way(workers, 4, 1_000_000, 2)

    assert way(64e6) == worker_transport.Way(4)  # 2 readings x 2 ranks x 4 workers x 4 ahead x 1 MB
    pipe = way(63e6)
    assert (pipe.workers, pipe.by_pipe) == (4, True)
    assert "/dev/shm: 63.0 MB of 64.0 MB free, micro-batches read ahead may take 64.0 MB" in pipe.notice
    assert way(1e5).workers == 0
    assert "each rank reads its data itself" in way(1e5).notice
    assert way(1e5, workers=0) == worker_transport.Way(0)
