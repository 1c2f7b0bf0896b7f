"""`trainer.loop.oom_trial`: the micro-batch that is tried, and the memory that the trial leaves."""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from trainer.data.loader import Loader
from trainer.loop import oom_trial

CPU = torch.device("cpu")


def trainer_with(trial_batch: Loader | None = None) -> Any:
    arguments = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(trial_batch=trial_batch, task=None, encoder=None, args=arguments, parameters={})


def test_what_a_data_worker_has_assembled_is_tried_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def assembled(task: Any, encoder: Any) -> Any:
        return {"samples": (multiprocessing.current_process().name,)}

    monkeypatch.setattr(oom_trial, "assemble_largest", assembled)
    monkeypatch.setattr(oom_trial, "DEVICES", ("cpu",))
    plan = SimpleNamespace(gpus_per_node=1, data_workers=1, settings=SimpleNamespace(tried=False))
    task: Any = SimpleNamespace(plan=plan)
    encoder: Any = None
    trainer = trainer_with(oom_trial.begin_trial_batch(task, encoder, CPU))
    first, second = (oom_trial._largest(trainer)["samples"][0] for _ in range(2))
    assert first != second == multiprocessing.current_process().name  # of a smaller plan, maybe


def test_what_is_assembled_while_a_base_loads_leaves_the_pixels_of_the_run_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers loads under another default dtype, and a processor keeps the mean that it made first."""
    image = Image.fromarray(np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3))
    expected, processor = Qwen2VLImageProcessor(), Qwen2VLImageProcessor()

    def pixels_by(processor: Any) -> torch.Tensor:
        pixels: torch.Tensor = processor(images=[image], return_tensors="pt")["pixel_values"]
        return pixels

    def assembled(task: Any, encoder: Any) -> Any:
        return {"samples": (pixels_by(processor),)}

    monkeypatch.setattr(oom_trial, "assemble_largest", assembled)
    monkeypatch.setattr(oom_trial, "DEVICES", ("cpu",))
    plan = SimpleNamespace(gpus_per_node=1, data_workers=1, settings=SimpleNamespace(tried=False))
    task: Any = SimpleNamespace(plan=plan)
    encoder: Any = None
    begun = oom_trial.begin_trial_batch(task, encoder, CPU)
    torch.set_default_dtype(torch.bfloat16)
    try:
        (tried,) = oom_trial._largest(trainer_with(begun))["samples"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(pixels_by(processor), pixels_by(expected))
    assert torch.equal(torch.as_tensor(tried), pixels_by(expected))


@pytest.mark.parametrize(("workers", "tried"), [(0, False), (1, True)])
def test_no_worker_assembles_what_is_not_tried_or_has_no_core(
    monkeypatch: pytest.MonkeyPatch, workers: int, tried: bool
) -> None:
    monkeypatch.setattr(oom_trial, "DEVICES", ("cpu",))
    plan = SimpleNamespace(gpus_per_node=1, data_workers=workers, settings=SimpleNamespace(tried=tried))
    task: Any = SimpleNamespace(plan=plan)
    encoder: Any = None
    assert oom_trial.begin_trial_batch(task, encoder, CPU) is None


@pytest.mark.parametrize(
    ("held", "free", "given_back"), [(True, 15, 0), (True, 5, 1), (False, 15, 1), (False, 5, 1)]
)
def test_a_trial_keeps_its_memory_for_the_first_step_where_others_have_enough(
    monkeypatch: pytest.MonkeyPatch, held: bool, free: int, given_back: int
) -> None:
    def compute(*_: Any) -> None:
        if not held:
            raise torch.OutOfMemoryError("full")

    calls: list[None] = []
    monkeypatch.setattr(oom_trial, "_forward_and_backward", compute)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(None))
    assert oom_trial._holds(trainer_with(), {}) is held  # type: ignore[typeddict-item]
    assert len(calls) == given_back


def test_the_trial_is_as_full_as_a_micro_batch_can_be_where_some_rows_share_a_prefix() -> None:
    tokens = np.array([500] * 20 + [480] * 20)
    own = np.array([200] * 20 + [480] * 20)
    batch = oom_trial.largest_micro_batch(tokens, own, 8000)
    assert batch.samples == tuple(range(20, 36))
    longest_first = oom_trial.largest_micro_batch(np.array([30, 50, 40]), np.array([20, 40, 30]), 95)
    assert longest_first.samples == (1, 2)
