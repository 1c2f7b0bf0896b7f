"""Every family on a GPU in fp32: packed against the stock model, one sample at a time. Skips itself without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from launch.inputs.families import FAMILIES
from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.tiny_families import write_tiny
from trainer.data.encoder import IGNORED, Encoder
from trainer.data.packing import pack
from trainer.data.rows import question_row
from trainer.data.splits import open_split
from trainer.model.base import load_base, prepare_training
from trainer.model.lora import add_lora, trainable_parameters
from trainer.prepare import prepare
from trainer.pretrained import load_processor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GROUPS = ((0,), (), (1, 2), (3, 4, 3))
"""Images of each row."""


@pytest.mark.parametrize("loss", ["sequence", "answer"])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_packed_losses_and_gradients_on_a_gpu_are_those_of_the_stock_model_one_at_a_time(
    kind: str, loss: str, world: Path, tmp_path: Path
) -> None:
    """With the loss on the answer the samples share a prefix."""
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(
        write_tiny(kind, tmp_path / "base", initializer_range=0.08, max_tokens=64)
    )
    values["lora"] = {"lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    recipe = recipe_from_dict(values)
    prepare(recipe, quiet=True)
    processor, rows = load_processor(recipe), open_split(recipe, "train")
    encoder = Encoder(processor, recipe.data.system_message, loss)
    prefix = len(encoder.shared_prefix)
    assert (prefix > 0) == (loss == "answer")
    images = [rows[number].images[0] for number in range(5)]
    samples = [
        encoder(question_row([images[number] for number in group], f"How high is bar {place}?", ["7"]))
        for place, group in enumerate(GROUPS)
    ]

    def packed(chosen: list[Any]) -> dict[str, Any]:
        inputs = pack(
            chosen,
            sample_ids=range(len(chosen)),
            step=0,
            masked=False,
            image_token_id=processor.image_token_id,
            merge=processor.image_processor.merge_size,
            prefixes=[prefix] * len(chosen),
        )
        return {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}

    def model() -> Any:
        made = add_lora(load_base(recipe, torch.device("cuda", 0)), recipe).train()
        draw = torch.Generator("cuda").manual_seed(1)
        for parameter in trainable_parameters(made).values():
            parameter.data.normal_(0, 0.05, generator=draw)
        return made

    ours, stock = model(), model()
    assert "plain" in prepare_training(ours, recipe)
    inputs = packed(samples)
    labels = inputs.pop("shift_labels")[0]
    losses = cross_entropy(ours(**inputs).logits[0], labels, reduction="none")
    losses.sum().backward()
    parts = losses.split([sample.target_tokens for sample in samples])
    for group, part, sample in zip(GROUPS, parts, samples, strict=True):
        alone = _stock_loss(stock, sample, processor)
        alone.backward()
        assert float(part.sum()) == pytest.approx(float(alone), rel=2e-5), group
    expected = trainable_parameters(stock)
    for name, parameter in trainable_parameters(ours).items():
        assert parameter.grad is not None
        wanted = expected[name].grad
        assert wanted is not None
        off = (parameter.grad - wanted).abs().max() / wanted.abs().max()
        assert off <= 1e-3, (name, float(off))


def _stock_loss(stock: Any, sample: Any, processor: Any) -> torch.Tensor:
    """transformers' own forward on one sample, and the sum of its targets' losses."""
    ids = torch.as_tensor(sample.input_ids)[None].cuda()
    images: dict[str, Any] = {}
    if len(sample.images):
        images = {
            "pixel_values": torch.cat([image.pixel_values for image in sample.images]).cuda(),
            "image_grid_thw": torch.tensor([image.grid for image in sample.images]).cuda(),
            "mm_token_type_ids": (ids == processor.image_token_id).int(),
        }
    logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    labels = torch.as_tensor(sample.labels)[1:].cuda()
    return cross_entropy(logits[:-1], labels, ignore_index=IGNORED, reduction="sum")
