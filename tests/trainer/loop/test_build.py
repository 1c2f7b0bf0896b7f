"""`trainer.loop.build`: what has begun ends where a run cannot be built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.errors import ConfigError
from trainer.loop import build as building


def test_the_trials_data_worker_ends_with_a_base_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[str] = []

    def damaged(*_: object) -> Any:
        raise ConfigError("model.name_or_path: cannot be loaded")

    monkeypatch.setattr(building, "load_processor", lambda recipe: None)
    monkeypatch.setattr(building, "Encoder", lambda *_: None)
    monkeypatch.setattr(building, "replace", lambda encoder, **_: encoder)
    begun = SimpleNamespace(close=lambda: ended.append("worker"))
    monkeypatch.setattr(building, "begin_trial_batch", lambda *_: begun)
    monkeypatch.setattr(building, "load_model", damaged)
    recipe = SimpleNamespace(
        training=SimpleNamespace(deterministic=False),
        data=SimpleNamespace(system_message="", loss="answer"),
        model=SimpleNamespace(dtype="bfloat16"),
    )
    task: Any = SimpleNamespace(recipe=recipe)
    state: Any = SimpleNamespace(device=torch.device("cpu"))
    requests: Any = None
    timer: Any = SimpleNamespace(record=lambda part: None)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        building.build(task, state, requests, 0, timer)
    assert ended == ["worker"]
