"""A packed micro-batch is its samples, one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.errors import RunError
from launch.inputs.dataset_index import Index
from launch.planning.step_plan import MicroBatch
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import recipe_values
from trainer.data.encoder import IGNORED, Encoder, mrope_positions
from trainer.data.micro_batches import assemble
from trainer.data.packing import pack
from trainer.data.splits import open_split
from trainer.model.base import load_base, prepare_training
from trainer.model.lora import add_lora
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
        pixel_values=sample.images[0].pixel_values,
        image_grid_thw=torch.tensor([sample.images[0].grid]),
        mm_token_type_ids=image[None],
    ).logits[0]
    return torch.nn.functional.cross_entropy(
        logits[:-1], sample.labels[1:], ignore_index=IGNORED, reduction="sum"
    )


def _pack(
    samples: list[Any],
    encoder: Encoder,
    *,
    masked: bool = False,
    ids: list[int] | None = None,
    step: int = 0,
    prefixes: list[int] | None = None,
) -> dict[str, Any]:
    """As training packs them: with the prefix that they have in common computed once."""
    processor = encoder.processor
    assert len(encoder.shared_prefix) > 30
    packed = pack(
        samples,
        sample_ids=ids or list(range(len(samples))),
        step=step,
        masked=masked,
        image_token_id=processor.image_token_id,
        merge=processor.image_processor.merge_size,
        prefixes=prefixes or [len(encoder.shared_prefix)] * len(samples),
    )
    return dict(packed)


def _packed_losses(model: Any, samples: list[Any], encoder: Encoder, **of: Any) -> torch.Tensor:
    inputs = _pack(samples, encoder, **of)
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
            image_grid_thw=torch.tensor([sample.images[0].grid]),
            attention_mask=torch.ones_like(sample.input_ids)[None],
        )
        assert torch.equal(mrope_positions(is_image, [sample.images[0].grid], 2), expected[-3:, 0])
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


@pytest.mark.parametrize("filler", [False, True])
def test_every_token_knows_its_sample_its_place_and_its_step(
    recipe: Recipe, index: Index, encoder: Encoder, filler: bool
) -> None:
    chosen = (41, 7, 7, 30)
    split = index.splits["train"]
    batch = assemble(open_split(recipe, "train"), split, encoder, MicroBatch(chosen, filler), 12, 99)
    inputs = batch["inputs"]
    assert (inputs["step"], batch["step"]) == (12, 12)
    lengths = [int(split.tokens[number]) for number in chosen]
    prefix = len(encoder.shared_prefix)
    assert inputs["sample_ids"].dtype == inputs["position_ids"].dtype == torch.int64
    whole = inputs["whole_rows"]  # of each token of the samples, its place in the row
    assert inputs["sample_ids"][whole].tolist() == [
        -1 if place < prefix else n for n, m in zip(chosen, lengths, strict=True) for place in range(m)
    ]
    assert inputs["position_ids"][0, 0, whole].tolist() == [place for m in lengths for place in range(m)]
    assert inputs["input_ids"].shape[1] == sum(lengths) - 3 * prefix == split.computed_tokens(chosen)


def test_a_sample_alone_has_the_prefixs_masks_and_one_without_it_its_own(
    encoder: Encoder, samples: list[Any]
) -> None:
    prefix = len(encoder.shared_prefix)
    alone = _pack(samples[:1], encoder, ids=[8])
    assert alone["sample_ids"].tolist() == [-1] * prefix + [8] * (len(samples[0].input_ids) - prefix)
    assert not len(alone["whole_rows"])
    mixed = _pack(samples[:3], encoder, ids=[8, 9, 10], prefixes=[prefix, 0, prefix])
    lengths = [len(sample.input_ids) for sample in samples[:3]]
    own = [lengths[0] - prefix, lengths[1], lengths[2] - prefix]
    expected = [-1] * prefix + [8] * own[0] + [9] * own[1] + [10] * own[2]
    assert mixed["sample_ids"].tolist() == expected
    assert torch.equal(
        mixed["input_ids"][0, mixed["whole_rows"]], torch.cat([sample.input_ids for sample in samples[:3]])
    )


def test_a_sample_that_does_not_begin_as_the_index_says_is_refused_also_alone(
    recipe: Recipe, index: Index, encoder: Encoder
) -> None:
    split = index.splits["train"]
    other = replace(encoder)
    other.__dict__["shared_prefix"] = [*encoder.shared_prefix[:-1], encoder.shared_prefix[-1] + 1]
    with pytest.raises(RunError, match=r"data: sample 3 \(row 3\) begins with other tokens than the system"):
        assemble(open_split(recipe, "train"), split, other, MicroBatch((3,), filler=False), 0, 1)


@pytest.mark.parametrize("prefixes", [[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]])
def test_a_shared_prefix_alters_no_loss_and_no_gradient(
    packed: Any, samples: list[Any], encoder: Encoder, prefixes: list[int]
) -> None:
    length = len(encoder.shared_prefix)
    alone = [
        _packed_losses(packed, [sample], encoder, ids=[n], prefixes=[0])
        for n, sample in enumerate(samples[:3])
    ]
    packed.zero_grad()
    torch.cat(alone).sum().backward()
    expected = _gradients(packed)
    together = _packed_losses(packed, samples[:3], encoder, prefixes=[length * each for each in prefixes])
    together.sum().backward()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(_gradients(packed), expected, strict=True):
        assert (mine - theirs).norm() <= 2e-6 * theirs.norm()


def test_no_label_crosses_a_sample_boundary(encoder: Encoder, samples: list[Any]) -> None:
    inputs = _pack(samples, encoder)
    ends = inputs["whole_rows"][inputs["text_cu_seqlens"][1:] - 1]
    assert not set(ends.tolist()) & set(inputs["scored_positions"].tolist())
    following = inputs["input_ids"][0, inputs["scored_positions"] + 1]
    assert torch.equal(inputs["shift_labels"][0], following)
    assert len(following) == sum(sample.target_tokens for sample in samples)


def _training(world: Path, *, recompute: bool) -> Any:
    """A model in training mode with dropout 0.3 in all its layers."""
    values = recipe_values(world)
    values["lora"] = {"lora_dropout": 0.3, "target_modules": "all-linear"}
    recipe = recipe_from_dict(values)
    model = _with_lora(recipe)
    prepare_training(model, recipe, recompute_every=int(recompute))
    return model.train()


def _gradients(model: Any) -> list[torch.Tensor]:
    """The gradients since the last call."""
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return gradients


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def dropping(world: Path) -> Any:
    return _training(world, recompute=True)


def test_recomputation_gives_the_same_gradients_with_dropout(
    world: Path, dropping: Any, samples: list[Any], encoder: Encoder
) -> None:
    plain = _training(world, recompute=False)
    for model in (plain, dropping):
        _packed_losses(model, samples[:3], encoder).sum().backward()
    assert _same(_gradients(plain), _gradients(dropping))


def test_dropout_masks_follow_the_sample_and_not_the_packing(
    dropping: Any, samples: list[Any], encoder: Encoder
) -> None:
    """Together, apart, in another order, in other company: the same gradients, up to the order of the sums."""
    chosen = [3, 0, 5, 2]

    def gradients(*groups: list[int], step: int = 4) -> list[torch.Tensor]:
        for ids in groups:
            of = [samples[number] for number in ids]
            _packed_losses(dropping, of, encoder, ids=ids, step=step).sum().backward()
        return _gradients(dropping)

    together = gradients(chosen)
    for groups in ([[3], [0], [5], [2]], [[2, 0], [5, 3]], [[0, 2, 3, 5]]):
        for mine, theirs in zip(gradients(*groups), together, strict=True):
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    for mine, theirs in zip(gradients(chosen, step=5), together, strict=True):
        assert (mine - theirs).norm() > 1e-2 * theirs.norm()


def test_recomputation_finds_its_own_masks_after_other_forwards(
    dropping: Any, samples: list[Any], encoder: Encoder
) -> None:
    _packed_losses(dropping, samples[:3], encoder).sum().backward()
    expected = _gradients(dropping)
    loss = _packed_losses(dropping, samples[:3], encoder).sum()
    _packed_losses(dropping, samples[2::-1], encoder, step=9)  # as many tokens, other masks
    with torch.no_grad():
        _packed_losses(dropping.eval(), samples[:3], encoder, step=-1)
    dropping.train()
    loss.backward()
    assert _same(_gradients(dropping), expected)


def test_a_training_step_draws_nothing_from_generators(
    dropping: Any, samples: list[Any], encoder: Encoder
) -> None:
    gradients = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        _packed_losses(dropping, samples[:3], encoder).sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        gradients.append(_gradients(dropping))
    assert _same(*gradients)


def test_training_without_packed_inputs_is_refused_when_there_is_dropout(
    dropping: Any, samples: list[Any], encoder: Encoder
) -> None:
    with pytest.raises(RunError, match=r"^lora\.lora_dropout: .* without the keys of its tokens"):
        dropping(input_ids=samples[0].input_ids[None])


def test_a_filler_has_gradients_and_they_are_zero(packed: Any, samples: list[Any], encoder: Encoder) -> None:
    """A rank that runs nothing but fillers in a step takes part in the reduction like any other."""
    packed.zero_grad()
    outputs = packed(**_pack(samples[:1], encoder, masked=True))
    (-outputs.log_probs.sum() / 5).backward()
    gradients = [parameter.grad for parameter in packed.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_last_layer_computes_the_tokens_that_are_read_alone_and_the_same_numbers(
    world: Path, samples: list[Any], encoder: Encoder
) -> None:
    """With dropout in all its linear layers; read are the answers, and a filler reads what weighs nothing."""
    model = _training(world, recompute=False)
    inputs = _pack(samples, encoder)
    answers = sum(sample.target_tokens + 1 for sample in samples)
    last = model.get_base_model().model.language_model.layers[-1]
    seen: list[int] = []
    hook = last.mlp.register_forward_hook(lambda _, given, output: seen.append(output.shape[1]))
    inputs["step"] = 4
    read = model(**inputs).log_probs
    read.sum().backward()
    mine = _gradients(model)
    inputs |= {"read_lengths": inputs["text_lengths"], "read_cu_seqlens": inputs["text_cu_seqlens"]}
    every = model(**inputs).log_probs
    every.sum().backward()
    hook.remove()
    assert seen == [answers, inputs["input_ids"].shape[1]]
    torch.testing.assert_close(read, every, rtol=1e-6, atol=1e-6)
    for one, other in zip(mine, _gradients(model), strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


def test_no_gradient_goes_below_the_first_adapter(world: Path, samples: list[Any], encoder: Encoder) -> None:
    model = _training(world, recompute=False)
    language = model.get_base_model().model.language_model
    wanted: list[bool] = []
    hook = language.layers[0].register_forward_pre_hook(
        lambda _, given: wanted.append(given[0].requires_grad)
    )
    model(**_pack(samples[:2], encoder)).log_probs.sum().backward()
    hook.remove()
    assert wanted == [False]


def test_the_tower_computes_an_image_once_that_several_samples_of_a_micro_batch_show(
    packed: Any, samples: list[Any], encoder: Encoder
) -> None:
    chosen = [samples[0], samples[1], samples[0], samples[2], samples[1]]
    inputs = _pack(chosen, encoder)
    assert inputs["fresh_grids"] == tuple(sample.images[0].grid for sample in samples[:3])
    assert len(inputs["pixel_values"]) == sum(len(sample.images[0].pixel_values) for sample in samples[:3])
    with torch.no_grad():
        together = _packed_losses(packed, chosen, encoder)
        alone = torch.cat([_packed_losses(packed, [sample], encoder) for sample in chosen])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
