"""Decoder layers that are away while the largest micro-batch is tried, as ZeRO-3 will have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch.errors import RunError
from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from trainer.model import layer_stand_ins
from trainer.model.base import add_lora, load_base


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank 0 of two, whose collectives do nothing."""
    monkeypatch.setattr(layer_stand_ins, "run_on_all_ranks", lambda action: action())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def _model(world: Path) -> Any:
    recipe = recipe_from_dict(recipe_values(world))
    return add_lora(load_base(recipe, torch.device("cpu")), recipe)


def _held(model: Any) -> int:
    """Bytes of the frozen weights of the decoder layers that are here."""
    weights = [
        weight
        for layer in layer_stand_ins.decoder_layers(model)
        for weight in layer_stand_ins.frozen_weights(layer)
    ]
    return sum(weight.untyped_storage().nbytes() for weight in weights)


def test_layers_come_back_as_they_were_and_one_at_a_time(
    world: Path, two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(world)
    layers = layer_stand_ins.decoder_layers(model)
    before = [weight.clone() for layer in layers for weight in layer_stand_ins.frozen_weights(layer)]
    size, shapes = _held(model), [weight.shape for weight in before]
    cuts: list[layer_stand_ins._Cut] = []
    cut = layer_stand_ins._cut
    monkeypatch.setattr(layer_stand_ins, "_cut", lambda weight: cuts.append(cut(weight)) or cuts[-1])
    whole_again: list[int] = []

    def gather(whole: torch.Tensor, share: torch.Tensor) -> None:
        """What rank 1 has is the second half."""
        whole_again.append(_held(model))
        number = next(number for number, each in enumerate(cuts) if each.share is share)
        bytes_ = before[number].contiguous().view(-1).view(torch.uint8)
        whole.zero_()[: len(bytes_)] = bytes_

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    with layer_stand_ins.temporarily_sharded(model):
        weights = [weight for layer in layers for weight in layer_stand_ins.frozen_weights(layer)]
        assert _held(model) < size / 100
        assert [weight.shape for weight in weights] == shapes
        shares = sum(each.share.nbytes for each in cuts)
        assert size / 2 <= shares < size / 2 + len(cuts)
    assert [weight.shape for weight in weights] == shapes
    assert all(torch.equal(found, expected) for found, expected in zip(weights, before, strict=True))
    first_layer = sum(1 for _ in layer_stand_ins.frozen_weights(layers[0]))
    assert max(whole_again[:first_layer]) < size / 100
    assert whole_again[first_layer] > size / 100


def test_bytes_that_did_not_come_back_end_the_run(world: Path, two_ranks: None) -> None:
    with (
        pytest.raises(RunError, match="are not what they were before the largest micro-batch was tried"),
        layer_stand_ins.temporarily_sharded(_model(world)),
    ):
        pass  # nothing is gathered: rank 1 does not answer
