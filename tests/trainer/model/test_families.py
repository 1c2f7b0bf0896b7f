"""A tower that trains: its masks belong to the image, and a micro-batch without an image has gradients of it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.inputs.families import FAMILIES, read_shape
from launch.inputs.model_shape import ModelShape
from launch.planning.memory import trained_parameters as planned_parameters
from launch.planning.memory_load import Kernels, load_of
from launch.planning.step_plan import MicroBatch
from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter
from tests.helpers.tiny_families import write_tiny
from trainer.data.encoder import Encoder
from trainer.data.micro_batches import assemble
from trainer.data.splits import open_split
from trainer.generation.replica import Replica
from trainer.model.base import prepare_training
from trainer.model.lora import trainable_parameters
from trainer.prepare import prepare
from trainer.pretrained import load_processor

REACH = {"qwen2_vl": ["fc2", "mlp.0"], "qwen2_5_vl": ["qkv", "mlp.2"], "qwen3_vl": ["linear_fc2"]}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_tower_with_lora_has_the_same_gradients_in_every_layout_and_some_without_an_image(
    kind: str, world: Path, tmp_path: Path
) -> None:
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(write_tiny(kind, tmp_path / "base"))
    values["lora"] = {"lora_dropout": 0.3, "target_modules": ["q_proj", *REACH[kind]], "use_dora": True}
    recipe = recipe_from_dict(values)
    split = prepare(recipe, quiet=True).splits["train"]
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "answer")
    rows = open_split(recipe, "train")
    model = random_adapter(recipe).train()
    prepare_training(model, recipe)
    weights = trainable_parameters(model)
    shape = read_shape(recipe)
    assert isinstance(shape, ModelShape)
    planned = planned_parameters(load_of(recipe, shape, "single", 1, Kernels()))
    assert planned == sum(weight.numel() for weight in weights.values())

    def gradients(*batches: tuple[int, ...]) -> dict[str, torch.Tensor]:
        for weight in weights.values():
            weight.grad = None
        for samples in batches:
            inputs = assemble(rows, split, encoder, MicroBatch(samples, filler=False), 5, 1)["inputs"]
            (-model(**inputs).log_probs.sum()).backward()
        return {name: weight.grad.clone() for name, weight in weights.items()}  # type: ignore[union-attr]

    together, apart = gradients((0, 1, 2, 3)), gradients((3,), (2, 0), (1,))
    for name, gradient in together.items():
        assert (gradient - apart[name]).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name
    _gradients_without_an_image(model, weights, rows, split, encoder)
    _base_looks_with_its_own_tower(model, encoder.processor, rows)


def _gradients_without_an_image(model: Any, weights: Any, rows: Any, split: Any, encoder: Encoder) -> None:
    inputs: Any = assemble(rows, split, encoder, MicroBatch((0,), filler=False), 5, 1)["inputs"]
    nothing = {name: inputs[name][:0] for name in ("pixel_values", "image_grid_thw", "fresh_positions")}
    inputs |= nothing | {"fresh_images": (), "fresh_grids": (), "vision_lengths": ()}
    for weight in weights.values():
        weight.grad = None
    (-model(**inputs).log_probs.sum()).backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert not any(weight.grad.any() for name, weight in weights.items() if ".visual." in name)


def _base_looks_with_its_own_tower(model: Any, processor: Any, rows: Any) -> None:
    model.eval()
    for part in (model.base_model.model.model.language_model, model.base_model.model.model.visual):
        part.config._attn_implementation = "sdpa"
    replica = Replica(model, processor, rows, 4, torch.float32)
    trained = replica.features.of([0])[0][0].values
    with model.disable_adapter():
        replica.forget_trained_features()
        assert not torch.allclose(replica.features.of([0])[0][0].values, trained)
