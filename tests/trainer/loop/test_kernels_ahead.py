"""`trainer.loop.kernels_ahead`: which micro-batches' kernels are loaded, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.inputs.dataset_index import Split
from trainer.loop import kernels_ahead
from trainer.loop import trainer as trainer_module
from trainer.loop.trainer import PlannedTrainer

TOKENS, VISUAL = np.array([30, 40, 50, 60, 70, 80]), np.array([10, 0, 20, 30, 0, 5])
NONE = np.zeros(6, dtype=np.int64)
SPLIT = Split(NONE, TOKENS - VISUAL, VISUAL, NONE, NONE, prefix_tokens=NONE + 4)
"""Each micro-batch has one sample, so its prefix is computed."""


def trainer_at(step: int, seen: object = "seen") -> Any:
    """Of the second of two ranks; it takes sample 2 k + 1 in step k of three."""
    visual = SimpleNamespace(spatial_merge_size=2)
    return SimpleNamespace(
        index=SimpleNamespace(splits={"train": SPLIT}),
        model=SimpleNamespace(get_base_model=lambda: SimpleNamespace(model=SimpleNamespace(visual=visual))),
        step_plan=SimpleNamespace(
            micro_batches_of=lambda at, rank: [SimpleNamespace(samples=[2 * at + rank])]
        ),
        plan=SimpleNamespace(max_steps=3),
        state=SimpleNamespace(global_step=step),
        args=SimpleNamespace(process_index=1, device="cpu"),
        resumed_at=0,
        seen_products=seen,
        recheck=None,
        _compute_micro_batch=lambda model, inputs: "loss",
    )


def sizes_loaded(monkeypatch: pytest.MonkeyPatch, trainer: Any) -> list[tuple[int, int, int]]:
    """(tokens, visual tokens, patches) of the micro-batches whose kernels are loaded."""
    sizes: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        kernels_ahead,
        "compute_ahead",
        lambda products, coming, device: sizes.extend(tuple(each.values()) for each in coming),
    )
    kernels_ahead.load_kernels_ahead(trainer, SimpleNamespace(products=set()))  # type: ignore[arg-type]
    return sizes


def test_kernels_are_those_of_the_rank_s_coming_micro_batches_within_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sizes_loaded(monkeypatch, trainer_at(1)) == [(60, 30, 120), (80, 5, 20)]
    monkeypatch.setattr(kernels_ahead, "_MICRO_BATCHES", 1)
    assert sizes_loaded(monkeypatch, trainer_at(1)) == [(60, 30, 120)]
    monkeypatch.setattr(kernels_ahead, "_TOKENS", 59)
    assert sizes_loaded(monkeypatch, trainer_at(1)) == []


def test_kernels_are_loaded_once_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(trainer_module, "load_kernels_ahead", lambda _, seen: loaded.append(seen))
    trainer = trainer_at(0)
    for step, calls in ((0, 0), (1, 1), (1, 1), (2, 1)):
        trainer.state.global_step = step
        assert PlannedTrainer.training_step(trainer, None, None) == "loss"  # type: ignore[arg-type]
        assert len(loaded) == calls
    assert loaded == ["seen"]
