"""A packed micro-batch is its samples, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.index import Index
from launch.recipe import Recipe, recipe_from_dict
from tests.conftest import recipe_values
from trainer.data.chartqa import open_split
from trainer.data.collate import IGNORED, Encoder, mrope_positions, pack
from trainer.model.base import add_lora, load_base, prepare_training
from trainer.prepare import prepare
from trainer.pretrained import load_processor


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["lora"] = {"lora_dropout": 0.0}
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def index(recipe: Recipe) -> Index:
    return prepare(recipe, quiet=True)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe, index: Index) -> Encoder:
    return Encoder(load_processor(recipe), recipe.data.system_message, "answer")


@pytest.fixture(scope="module")
def samples(recipe: Recipe, encoder: Encoder) -> list[Any]:
    rows = open_split(recipe, "train")
    return [encoder(rows[number]) for number in range(6)]


@pytest.fixture(scope="module")
def stock(recipe: Recipe) -> Any:
    """The base with random LoRA, as transformers and PEFT run it."""
    return _with_lora(recipe)


@pytest.fixture(scope="module")
def packed(recipe: Recipe) -> Any:
    """The same weights, made to take packed micro-batches."""
    model = _with_lora(recipe)
    prepare_training(model, recipe)
    return model


def _with_lora(recipe: Recipe) -> Any:
    model = add_lora(load_base(recipe, torch.device("cpu")), recipe)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model.eval()


def _loss_alone(model: Any, sample: Any, encoder: Encoder) -> torch.Tensor:
    """Sum of the sample's token losses through the stock path: its own positions, masks and vision attention."""
    image = (sample.input_ids == encoder.processor.image_token_id).long()
    logits = model(
        input_ids=sample.input_ids[None],
        attention_mask=torch.ones_like(sample.input_ids)[None],
        pixel_values=sample.pixel_values,
        image_grid_thw=torch.tensor([sample.grid]),
        mm_token_type_ids=image[None],
    ).logits[0]
    return torch.nn.functional.cross_entropy(
        logits[:-1], sample.labels[1:], ignore_index=IGNORED, reduction="sum"
    )


def _pack(samples: list[Any], encoder: Encoder, masked: bool = False) -> dict[str, Any]:
    processor = encoder.processor
    merge = processor.image_processor.merge_size
    return dict(pack(samples, masked=masked, image_token_id=processor.image_token_id, merge=merge))


def _packed_losses(model: Any, samples: list[Any], encoder: Encoder) -> torch.Tensor:
    inputs = _pack(samples, encoder)
    labels = inputs.pop("shift_labels")[0]
    logits = model(**inputs).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.stack([part.sum() for part in losses.split([sample.target_tokens for sample in samples])])


def test_a_packed_micro_batch_gives_the_losses_and_gradients_of_its_samples_alone(
    stock: Any, packed: Any, samples: list[Any], encoder: Encoder
) -> None:
    alone = torch.stack([_loss_alone(stock, sample, encoder) for sample in samples])
    together = _packed_losses(packed, samples, encoder)
    assert len(set(alone.tolist())) == len(samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    alone.sum().backward()
    together.sum().backward()
    for (name, one), other in zip(stock.named_parameters(), packed.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.abs().max() > 0, name
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sample_does_not_see_its_neighbours(packed: Any, samples: list[Any], encoder: Encoder) -> None:
    forward, backward = (_packed_losses(packed, order, encoder) for order in (samples, samples[::-1]))
    torch.testing.assert_close(forward, backward.flip(0), rtol=1e-5, atol=1e-5)


def test_positions_are_those_of_the_models_own_rope_index(
    stock: Any, samples: list[Any], encoder: Encoder
) -> None:
    for sample in samples:
        is_image = sample.input_ids == encoder.processor.image_token_id
        expected, _ = stock.get_base_model().model.get_rope_index(
            sample.input_ids[None],
            mm_token_type_ids=is_image.long()[None],
            image_grid_thw=torch.tensor([sample.grid]),
            attention_mask=torch.ones_like(sample.input_ids)[None],
        )
        assert torch.equal(mrope_positions(is_image, sample.grid, 2), expected[-3:, 0])
        assert torch.equal(sample.positions, expected[-3:, 0])


def test_the_vision_tower_leaves_no_graph(packed: Any, samples: list[Any], encoder: Encoder) -> None:
    seen: list[bool] = []
    visual = packed.get_base_model().model.visual
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad))
        for module in (visual.patch_embed, visual.blocks[0], visual.merger)
    ]
    _packed_losses(packed, samples[:2], encoder)
    for hook in hooks:
        hook.remove()
    assert seen == [False, False, False]


def test_only_the_answer_is_scored_and_its_end(encoder: Encoder, recipe: Recipe, samples: list[Any]) -> None:
    rows = open_split(recipe, "train")
    for number, sample in enumerate(samples):
        scored = sample.input_ids[sample.labels != IGNORED]
        assert encoder.processor.tokenizer.decode(scored) == f"{rows[number].label[0]}<|im_end|>\n"


def test_sequence_loss_scores_every_token_but_the_first(encoder: Encoder, recipe: Recipe) -> None:
    sample = Encoder(encoder.processor, encoder.system_message, "sequence")(open_split(recipe, "train")[0])
    assert sample.target_tokens == len(sample.input_ids) - 1


def test_a_filler_scores_nothing(encoder: Encoder, samples: list[Any]) -> None:
    inputs = _pack(samples[:1], encoder, masked=True)
    assert inputs["shift_labels"].shape == (1, 0)
    assert inputs["input_ids"].shape[1] == len(samples[0].input_ids)


def test_no_label_crosses_a_sample_boundary(encoder: Encoder, samples: list[Any]) -> None:
    inputs = _pack(samples, encoder)
    ends = inputs["text_cu_seqlens"][1:] - 1
    assert not set(ends.tolist()) & set(inputs["scored_positions"].tolist())
    following = inputs["input_ids"][0, inputs["scored_positions"] + 1]
    assert torch.equal(inputs["shift_labels"][0], following)
    assert len(following) == sum(sample.target_tokens for sample in samples)


def test_recomputation_gives_the_same_gradients_with_dropout(
    world: Path, samples: list[Any], encoder: Encoder
) -> None:
    gradients = []
    for recompute in (False, True):
        values = recipe_values(world)
        values["training"]["gradient_checkpointing"] = recompute
        values["lora"] = {"lora_dropout": 0.3}
        model = _with_lora(recipe_from_dict(values))
        prepare_training(model, recipe_from_dict(values))
        model.train()
        torch.manual_seed(3)
        _packed_losses(model, samples[:3], encoder).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_filler_has_gradients_and_they_are_zero(packed: Any, samples: list[Any], encoder: Encoder) -> None:
    """A rank that runs nothing but fillers in a step takes part in the reduction like any other."""
    from trl.trainer.utils import add_fused_lm_head

    base = packed.get_base_model()
    forward = base.forward
    add_fused_lm_head(base)
    packed.zero_grad()
    outputs = packed(**_pack(samples[:1], encoder, masked=True), fused_lm_head=True)
    (-outputs.log_probs.sum() / 5).backward()
    base.forward = forward
    gradients = [parameter.grad for parameter in packed.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
