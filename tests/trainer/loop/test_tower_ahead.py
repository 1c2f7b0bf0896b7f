"""The vision tower ahead of its step: its features are those of the forward, and where it cannot run it does not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.planning.step_plan import MicroBatch
from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter
from trainer.data.encoder import Encoder
from trainer.data.loader import Loader
from trainer.data.micro_batches import PackedBatch, assemble
from trainer.data.splits import open_split
from trainer.loop import tower_ahead
from trainer.loop.tower_ahead import run_tower, tower_can_run_ahead
from trainer.loop.trainer import PlannedTrainer
from trainer.model.base import RECIPE_DTYPES, compute_in, prepare_training
from trainer.prepare import prepare
from trainer.pretrained import load_processor

CPU = torch.device("cpu")
KEPT: list[torch.Tensor] = []
"""The features that the forward used, as the cache of features would hear of them."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model_and_batch(world: Path, request: pytest.FixtureRequest) -> tuple[Any, PackedBatch]:
    """A model that trains on packed micro-batches, and one of them, in which two samples show the same image.

    In bfloat16 the forward is under autocast.
    """
    values = recipe_values(world)
    values["model"]["dtype"] = request.param
    recipe = recipe_from_dict(values)
    split = prepare(recipe, quiet=True).splits["train"]
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    model = random_adapter(recipe).train()
    dtype = RECIPE_DTYPES[request.param]
    prepare_training(model, recipe, compute_dtype=dtype, keep=lambda _, __, features: KEPT.append(features))
    compute_in(model, dtype)
    batch = assemble(
        open_split(recipe, "train"), split, encoder, MicroBatch((0, 1, 2, 0), filler=False), 5, 1
    )
    batch["inputs"]["fresh_images"] = tuple(str(n) for n in range(len(batch["inputs"]["fresh_grids"])))
    return model, batch


def test_a_forward_with_the_towers_features_is_that_which_runs_it_to_the_bit(
    model_and_batch: tuple[Any, PackedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_and_batch
    inputs: Any = batch["inputs"]
    visual = model.get_base_model().model.visual
    stock, modes = visual.forward, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        modes.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return stock(*args, **kwargs)

    monkeypatch.setattr(visual, "forward", watched)
    KEPT.clear()
    expected = model(**inputs).log_probs
    ahead: Any = run_tower(batch, model, CPU)
    assert set(ahead["inputs"]) - set(inputs) == {"fresh_features"}  # the batch is as it was
    assert not ahead["inputs"]["pixel_values"].numel()  # they would stay on the device for the whole step
    assert inputs["pixel_values"].numel()
    model.eval()  # an evaluation comes between
    with torch.no_grad():
        model(**inputs)
    model.train()
    assert torch.equal(model(**ahead["inputs"]).log_probs, expected)
    assert (
        modes == [(False, False)] * 3
    )  # not for what ran ahead; a GPU's LayerNorm rounds otherwise under autocast
    assert len(KEPT) == 3
    assert all(torch.equal(features, KEPT[0]) for features in KEPT)
    assert not KEPT[2].requires_grad


def test_without_memory_for_the_tower_the_micro_batch_stays_as_it_is_and_it_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def too_large(*_: Any) -> Any:
        tries.append(1)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tower_ahead, "with_tower_features", too_large)
    loader = Loader.__new__(Loader)
    batch: Any = {"inputs": {}}
    loader._ready = batch
    base = SimpleNamespace(model=None)
    trainer: Any = SimpleNamespace(
        training_loader=loader,
        tower_runs_ahead=True,
        model=SimpleNamespace(get_base_model=lambda: base),
        plan=SimpleNamespace(parallelism=SimpleNamespace(shards_layers=False)),
        args=SimpleNamespace(device=CPU),
        record=SimpleNamespace(phase=lambda _: nullcontext()),
    )
    with caplog.at_level("INFO", logger="trainer"):
        PlannedTrainer._run_tower_ahead(trainer)
        PlannedTrainer._run_tower_ahead(trainer)
    assert loader._ready is batch
    assert len(tries) == 1
    assert caplog.text.count("there is no memory for it") == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_only_a_frozen_tower_runs_ahead(frozen: bool) -> None:
    tower = torch.nn.Linear(1, 1).requires_grad_(not frozen)
    base = SimpleNamespace(model=SimpleNamespace(visual=tower))
    model: Any = SimpleNamespace(get_base_model=lambda: base)
    assert tower_can_run_ahead(model) is frozen
