"""Decoder layers as CUDA graphs against the same layers launched kernel by kernel. Skips itself without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import recipe_values
from trainer.data.encoder import Encoder
from trainer.data.packing import pack
from trainer.data.splits import open_split
from trainer.model.base import (
    RECIPE_DTYPES,
    add_lora,
    compute_in,
    graph_layers,
    load_base,
    prepare_training,
    trainable_parameters,
)
from trainer.model.filled_rows import bucket_of
from trainer.prepare import prepare
from trainer.pretrained import load_processor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BFLOAT16 = RECIPE_DTYPES["bfloat16"]


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["model"]["dtype"] = "bfloat16"
    values["training"]["deterministic"] = False
    values["quantization"] = {"load_in_4bit": True}
    values["lora"] = {"lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return recipe_from_dict(values)


def packed(recipe: Recipe, loss: Any, step: int, samples: range) -> dict[str, Any]:
    """A micro-batch on the GPU."""
    processor = load_processor(recipe)
    encoder = Encoder(processor, recipe.data.system_message, loss)
    rows = open_split(recipe, "train")
    inputs = pack(
        [encoder(rows[number]) for number in samples],
        sample_ids=samples,
        step=step,
        masked=False,
        image_token_id=processor.image_token_id,
        merge=2,
    )
    return {key: v.cuda() if isinstance(v, torch.Tensor) else v for key, v in inputs.items()}


@pytest.mark.parametrize(
    "loss", ["sequence", "answer"]
)  # with `answer` the last layer computes few tokens alone
def test_graphs_compute_what_the_layers_compute_launch_by_launch_and_add_up_over_micro_batches(
    recipe: Recipe, loss: str
) -> None:
    prepare(recipe, quiet=True)
    model = add_lora(load_base(recipe, torch.device("cuda", 0)), recipe).train()
    draw = torch.Generator("cuda").manual_seed(1)
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=draw, device="cuda") * 0.05
    prepare_training(model, recipe, compute_dtype=BFLOAT16, resident_weights=True)
    compute_in(model, BFLOAT16)
    graphs = graph_layers(model, recipe, BFLOAT16, 8000)
    assert graphs is not None
    batches = [packed(recipe, loss, *each) for each in ((3, range(4)), (3, range(4, 10)), (4, range(2, 6)))]

    def passes() -> tuple[list[float], torch.Tensor]:
        for parameter in parameters.values():
            parameter.grad = None
        losses = []
        for batch in batches:
            loss = -model(**dict(batch)).log_probs.sum()
            loss.backward()
            losses.append(loss.item())
        return losses, torch.cat([parameter.grad.flatten() for parameter in parameters.values()])

    losses, gradients = passes()
    again = passes()
    assert graphs.replays == 0
    report = graphs.capture([bucket_of(batch["text_lengths"]) for batch in batches])
    assert report is not None
    assert "captured" in report
    for _ in range(2):
        replayed_losses, replayed = passes()
        assert replayed_losses == losses
        # Attention's backward pass adds up in any order: as far apart as two passes without graphs.
        assert (replayed - gradients).abs().max() <= 2 * (again[1] - gradients).abs().max() + 1e-4
    assert graphs.replays == 6
    with torch.no_grad():  # an evaluation computes without them
        assert model(**dict(batches[0])).log_probs is not None
    assert graphs.replays == 6
    graphs.given_up = True  # nothing is filled up
    exact_losses, exact = passes()
    assert graphs.replays == 6
    assert losses == pytest.approx(exact_losses, rel=2e-3)
    assert (gradients - exact).norm() / exact.norm() < 3e-2
