"""Speed, memory and utilization between two lines of progress."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.inputs.dataset_index import Split
from launch.inputs.families import shape_of
from launch.planning.step_plan import cost
from tests.helpers.attempts import INDEX, planned, recipe_of
from tests.helpers.indexes import HUB_7B
from trainer.data.loader import DATA_WAIT
from trainer.loop import step_figures
from trainer.loop.step_figures import StepFigures, peak_flops, sample_flops, screen_text


def plan_of() -> Any:
    from launch.run.continuation import Continuation

    return planned(recipe_of(), Continuation())


def test_a_cards_ceiling_is_found_by_its_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("NVIDIA A1000") is None


def _chart(visual: int, targets: int = 3) -> Split:
    """One sample of 123 tokens of text and an image."""
    numbers = {name: np.array([1]) for name in ("rows", "human_or_machine")}
    return replace(
        INDEX.splits["train"],
        **numbers,
        text_tokens=np.array([123]),
        visual_tokens=np.array([visual]),
        target_tokens=np.array([targets]),
        digests=INDEX.splits["train"].digests[:1],
        image_tokens=None,
    )


def test_operations_are_those_of_the_performance_notes() -> None:
    shape = shape_of(HUB_7B)
    cached = sample_flops(shape, _chart(688), vision=False)
    whole = sample_flops(shape, _chart(688), vision=True)
    assert cached == pytest.approx(21.4e12, rel=0.02)
    assert whole == pytest.approx(26.5e12, rel=0.02)
    assert whole == pytest.approx(cost(123, 688) * 1e9, rel=0.01)  # but for the head
    head = sample_flops(shape, _chart(688, targets=13), vision=True) - whole
    assert head == pytest.approx(10 * 2 * 1.09e9, rel=0.001)


def test_blocks_in_windows_count_the_pairs_within_them() -> None:
    shape = shape_of(HUB_7B)
    windowed = replace(shape, windowed_blocks=28, vision_window_patches=64)
    saved = sample_flops(shape, _chart(688), True) - sample_flops(windowed, _chart(688), True)
    patches = 4 * 688
    assert saved == pytest.approx(28 * 4 * 1280 * patches * (patches - 64))


def test_a_line_has_the_speed_since_the_last_one_and_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(step_figures.time, "perf_counter", lambda: now)
    plan = plan_of()
    figures = StepFigures(recipe_of(), INDEX, plan)
    figures.on_train_begin(None, SimpleNamespace(global_step=7), None)  # type: ignore[arg-type]

    def log(step: int, **values: float) -> dict[str, float]:
        figures.on_log(None, SimpleNamespace(global_step=step), None, values)  # type: ignore[arg-type]
        return values

    now, DATA_WAIT.seconds = 104.0, DATA_WAIT.seconds + 1
    first = log(9, loss=1.0)
    assert first["seconds_per_step"] == 2.0
    assert first["samples_per_second"] == plan.global_batch_size / 2
    assert first["tokens_per_second"] == pytest.approx(
        INDEX.splits["train"].tokens.mean() * plan.global_batch_size / 2
    )
    assert first["data_wait"] == 0.25
    assert "mfu" not in first  # a CPU
    assert figures.seconds_left == 2.0 * (plan.max_steps - 9)
    now = 110.0
    assert log(9, eval_loss=1.0) == {"eval_loss": 1.0}
    second = log(10, loss=1.0)
    assert second["seconds_per_step"] == 6.0
    assert figures.seconds_left == pytest.approx(10 / 3 * (plan.max_steps - 10))
    text = screen_text(
        {"loss": 0.5, "seconds_per_step": 2.0, "tokens_per_second": 1234.5, "data_wait": 0.1}, 3700
    )
    assert text == "loss 0.5 2 s/step 1,234 tokens/s 1:01:40 left"
