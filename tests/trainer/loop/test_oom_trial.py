"""`trainer.loop.oom_trial`: the micro-batch that is tried, and the memory that the trial leaves."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.loop import oom_trial


def trainer_with(trial_batch: Future[Any] | None = None) -> Any:
    arguments = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(trial_batch=trial_batch, task=None, encoder=None, args=arguments, parameters={})


def test_what_was_assembled_beside_the_base_is_tried_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom_trial, "assemble_largest", lambda task, encoder: "anew")
    begun: Future[Any] = Future()
    begun.set_result("begun")
    trainer = trainer_with(begun)
    assert [oom_trial._largest(trainer) for _ in range(2)] == ["begun", "anew"]  # of a smaller plan, maybe
    failed: Future[Any] = Future()
    failed.set_exception(ValueError("row 3"))
    assert oom_trial._largest(trainer_with(failed)) == "anew"


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
