"""The vision tower's attention: the kernel's numbers, and which kernel a card gets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from trainer.data.packing import cumulative
from trainer.model import tower_attention
from trainer.model.attention import Segments, attend
from trainer.model.attention_kernel import attend_images
from trainer.model.tower_attention import DEFAULT, KERNELS, kernel_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OWN = next(name for name in KERNELS if name != DEFAULT)
CARD = (torch.device("cuda", 0), torch.bfloat16, 16, 80)


@pytest.mark.parametrize("width", [80, 64])
def test_the_kernel_attends_within_every_image_as_the_loop_does(width: int) -> None:
    """Images shorter and longer than a tile, whole multiples of tiles and not."""
    lengths = (37, 128, 1, 200, 64)
    segments = Segments(cumulative(lengths).to(DEVICE), lengths)
    draw = torch.Generator().manual_seed(0)
    shape = 3, sum(lengths), 2, width
    q, k, v = torch.randn(shape, generator=draw).to(DEVICE, torch.bfloat16).float().unbind()
    expected = attend(q, k, v, segments, False, 0.2)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    found = attend_images(q.to(dtype), k.to(dtype), v.to(dtype), segments.cu_seqlens, lengths, 0.2)
    assert (found.float() - expected).norm() / expected.norm() < (1e-2 if DEVICE.type == "cuda" else 1e-5)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A GPU on which our kernel is the faster one; how often it was measured."""
    measured: list[int] = []

    def measure(*_: object) -> dict[str, float]:
        measured.append(1)
        return {DEFAULT: 2.5, OWN: 1.5}

    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card / 9000")
    monkeypatch.setattr(tower_attention, "_measured", measure)
    kernel_for.cache_clear()
    yield measured
    kernel_for.cache_clear()


def test_the_fastest_kernel_is_measured_once_for_a_card_and_its_versions(
    card: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_for(*CARD) == OWN
    kernel_for.cache_clear()  # another process
    assert kernel_for(*CARD) == OWN
    assert len(card) == 1
    (file,) = (tmp_path / "kernels").glob("*.json")
    assert json.loads(file.read_text())["card"] == "Card / 9000"
    kernel_for.cache_clear()
    monkeypatch.setattr(torch, "__version__", "99")
    kernel_for(*CARD)
    assert len(card) == 2


def test_two_ranks_that_begin_together_take_the_kernel_of_one_measurement(
    card: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank would find other times, and kernels differ in their rounding."""
    choose = kernel_for.__wrapped__

    def measure(*_: object) -> dict[str, float]:
        card.append(1)
        time.sleep(0.3)  # the other rank comes meanwhile
        return {DEFAULT: 2.5, OWN: 1.5} if len(card) == 1 else {DEFAULT: 1.4, OWN: 1.5}

    monkeypatch.setattr(tower_attention, "_measured", measure)
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(lambda _: choose(*CARD), range(2))) == [OWN, OWN]
    assert len(card) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"milliseconds": {}}', '{"milliseconds": {"other": 1.0}}'])
def test_a_damaged_memory_of_it_is_measured_anew(card: list[int], tmp_path: Path, content: str) -> None:
    kernel_for(*CARD)
    (file,) = (tmp_path / "kernels").glob("*.json")
    file.write_text(content)
    kernel_for.cache_clear()
    assert kernel_for(*CARD) == OWN
    assert len(card) == 2
    assert json.loads(file.read_text())["milliseconds"] == {DEFAULT: 2.5, OWN: 1.5}


def test_what_a_version_with_fewer_kernels_measured_is_measured_anew(
    card: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a faster kernel of a new version would never be used on a card that an older one has seen."""
    with monkeypatch.context() as older:
        older.setattr(tower_attention, "KERNELS", {name: KERNELS[name] for name in (DEFAULT, OWN)})
        kernel_for(*CARD)
    kernel_for.cache_clear()
    kernel_for(*CARD)
    assert len(card) == 2
    (file,) = (tmp_path / "kernels").glob("*.json")
    assert json.loads(file.read_text())["kernels"] == list(KERNELS)


def test_what_a_version_measured_with_the_hosts_work_in_it_is_measured_anew(
    card: list[int], tmp_path: Path
) -> None:
    kernel_for(*CARD)
    (file,) = (tmp_path / "kernels").glob("*.json")
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "calls"}
    file.write_text(json.dumps(older))
    kernel_for.cache_clear()
    kernel_for(*CARD)
    assert len(card) == 2


def test_a_kernel_that_takes_the_host_longer_to_launch_is_not_taken_for_a_slower_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"host": 0.0, "gpu": 0.0}  # now, and when the GPU has done what it was given

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.moment = 0.0

        def record(self) -> None:
            self.moment = max(clock["host"], clock["gpu"])

        def synchronize(self) -> None:
            clock["host"] = max(clock["host"], self.moment)

        def elapsed_time(self, later: Event) -> float:
            return later.moment - self.moment

    def run() -> None:
        clock["host"] += 0.4
        clock["gpu"] = max(clock["host"], clock["gpu"]) + 0.6

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert tower_attention._milliseconds(run) == pytest.approx(0.6)


def test_a_deterministic_run_depends_on_no_measurement(card: list[int]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert kernel_for(*CARD) == DEFAULT
    finally:
        torch.use_deterministic_algorithms(False)
    assert not card


def test_kernels_for_other_cards_are_passed_over_and_a_lost_gpu_is_no_reason_to_take_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors = [NotImplementedError(), RuntimeError("no such instruction"), torch.AcceleratorError("lost")]

    def plain(q: torch.Tensor, *_: object) -> torch.Tensor:
        return q

    def failing(*_: object) -> torch.Tensor:
        raise errors[0]

    monkeypatch.setattr(tower_attention, "_pytorch", plain)
    monkeypatch.setattr(tower_attention, "_milliseconds", lambda _: 1.0)
    monkeypatch.setattr(tower_attention, "_LENGTHS", (4, 3))
    monkeypatch.setattr(tower_attention, "KERNELS", {DEFAULT: plain, "another": failing})
    arguments = (torch.device("cpu"), torch.float32, 2, 16)
    with caplog.at_level("INFO", logger="trainer"):
        assert tower_attention._measured(*arguments) == {DEFAULT: 1.0}
        assert not caplog.text
        errors.pop(0)
        assert tower_attention._measured(*arguments) == {DEFAULT: 1.0}
        assert "another does not run here (RuntimeError)" in caplog.text
        errors.pop(0)
        with pytest.raises(torch.AcceleratorError):
            tower_attention._measured(*arguments)
