"""Sizes of real models from what the hub's config.json says of them."""

from __future__ import annotations

import pytest

from launch.inputs.families import shape_of
from tests.helpers.published_models import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_weight_of_a_published_model_is_counted(name: str) -> None:
    config, parameters = PUBLISHED[name]
    shape = shape_of(config)
    layers = shape.layers * shape.layer_weights
    assert layers + shape.tower_weights + shape.vocabulary_weights + shape.other_weights == parameters
