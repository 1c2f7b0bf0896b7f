"""Every guard fires for what it is there for, and is quiet otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch.errors import ConfigError, RunError
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import chart_png, recipe_values
from trainer.checks import sharding
from trainer.checks.sharding import LayerReference, check_sharding, reference_layer
from trainer.checks.training import (
    GradientCheck,
    check_logits,
    check_same_adapters,
    check_step_taken,
    describe_targets,
)
from trainer.data.encoder import Encoder
from trainer.data.packing import ModelInputs, pack
from trainer.data.rows import question_row
from trainer.model.base import load_base
from trainer.model.lora import add_lora
from trainer.pretrained import load_processor

CPU = torch.device("cpu")


def _recipe(world: Path, base: Path | None = None) -> Recipe:
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = True
    values["model"]["name_or_path"] = str(base or world / "base")
    return recipe_from_dict(values)


# what a layer is, whole and sharded ---------------------------------------------------------------------------


def test_a_base_that_is_read_layer_by_layer_is_the_base_that_is_read_at_once(world: Path) -> None:
    seen: list[LayerReference] = []
    at_once = load_base(_recipe(world), CPU, "float16")
    one_by_one = load_base(_recipe(world), CPU, "float16", lambda layer: seen.append(reference_layer(layer)))
    expected, found = dict(at_once.named_parameters()), dict(one_by_one.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        # As bytes: packed weights stored as floats hold NaN, which equals nothing.
        assert torch.equal(_bytes(found[name]), _bytes(parameter)), name
        assert found[name].dtype == parameter.dtype
    layers = at_once.model.language_model.layers
    assert len(seen) == len(layers)
    for before, layer in zip(seen, layers, strict=True):
        now = reference_layer(layer)
        assert (now.bytes, now.constants) == (before.bytes, before.constants)
        assert _changed(before, now) == set()
        assert now.constants > 0
        assert torch.equal(now.output, before.output)
        assert now.output.abs().max() > 0


def test_layers_are_found_in_several_files_and_by_their_names_on_the_hub(world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    (file,) = base.glob("*.safetensors")
    tensors = {
        key.replace("model.language_model.", "model."): value for key, value in load_file(file).items()
    }
    assert any(key.startswith("model.layers.1.") for key in tensors)
    file.unlink()
    parts = {f"model-0000{part + 1}-of-00002.safetensors": list(tensors)[part::2] for part in (0, 1)}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, base / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_base(_recipe(world, base), CPU, "float16", lambda layer: None).state_dict()
    expected = load_base(_recipe(world), CPU, "float16").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(_bytes(found[name]), _bytes(expected[name])) for name in expected)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("spoilt", ["missing", "shape"])
def test_a_layer_that_is_not_whole_is_refused(world: Path, tmp_path: Path, spoilt: str) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("layers.1.self_attn.k_proj.weight"))
    if spoilt == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"decoder layer 1 has .*self_attn\.k_proj\.weight"):
        load_base(_recipe(world, base), CPU, "float16", lambda layer: None)


ONE, TWO, THREE = torch.tensor([[1, 1], [2, 2], [3, 2]])
FACTS = LayerReference({"q_proj": ONE, "v_proj": TWO}, torch.ones(3), 1000)


@pytest.mark.parametrize(
    ("after", "local", "words"),
    [
        (
            LayerReference({"q_proj": ONE, "v_proj": THREE}, torch.ones(3), 1000),
            500,
            r"changed the packed .* 4 \(1 of 2 weights",
        ),
        (LayerReference({"q_proj": ONE}, torch.ones(3), 1000), 500, r"changed the packed"),
        (
            LayerReference(FACTS.packed, torch.tensor([1, 1, 1.001]), 1000),
            500,
            r"computes otherwise .* 0\.001",
        ),
        (LayerReference(FACTS.packed, torch.tensor([1, 1, float("nan")]), 1000), 500, r"computes otherwise"),
        (FACTS, 560, r"not sharded: 560 of its 1,000 bytes are resident, at most 550"),
    ],
    ids=["bytes", "weight gone", "output", "nan", "whole"],
)
def test_what_sharding_does_to_a_layer_is_noticed(after: LayerReference, local: int, words: str) -> None:
    sharding._compare_layer(4, FACTS, FACTS, 540, 2)
    with pytest.raises(RunError, match=words):
        sharding._compare_layer(4, FACTS, after, local, 2)


def _flip_a_byte(layer: nn.Module) -> None:
    weight = layer.self_attn.q_proj.base_layer.weight.data  # type: ignore[union-attr]
    weight.view(torch.uint8).view(-1)[0] ^= 1


def _scale_a_norm(layer: nn.Module) -> None:
    layer.input_layernorm.weight.data *= 1.01  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("happens", "processes", "words"),
    [
        (_flip_a_byte, 1, r"changed the packed 4-bit bytes of decoder layer 1 \(1 of \d+ weights, .*q_proj"),
        (_scale_a_norm, 1, r"decoder layer 1 computes otherwise"),
        (None, 2, r"decoder layer 0 is not sharded"),
        (None, 1, None),
    ],
    ids=["bytes", "output", "whole", "well"],
)
def test_every_layer_is_held_against_what_it_was_before_it_was_sharded(
    world: Path, happens: Callable[[nn.Module], None] | None, processes: int, words: str | None
) -> None:
    """On a model whose layers come together without having been taken apart."""
    whole: list[LayerReference] = []
    recipe = _recipe(world)
    model = add_lora(
        load_base(recipe, CPU, "float16", lambda layer: whole.append(reference_layer(layer))), recipe
    )
    calls: list[str] = []
    for number, layer in enumerate(model.get_base_model().model.language_model.layers):
        layer.unshard = partial(_come_together, calls, happens if number == 1 else None, layer)
        layer.reshard = partial(calls.append, "reshard")
    if words is None:
        check_sharding(model, whole, processes)
        assert calls == ["unshard", "reshard"] * len(whole)
    else:
        with pytest.raises(RunError, match=words):
            check_sharding(model, whole, processes)


def _come_together(calls: list[str], happens: Callable[[nn.Module], None] | None, layer: nn.Module) -> None:
    calls.append("unshard")
    if happens:
        happens(layer)


def test_bytes_that_look_like_nan_keep_their_checksum_and_bfloat16_that_rewrites_them_is_noticed(
    world: Path,
) -> None:
    """What FSDP2 does to bfloat16 storage on a GPU: a signalling NaN becomes a quiet one."""
    seen: list[nn.Module] = []
    load_base(_recipe(world), CPU, "bfloat16", seen.append)
    layer = seen[0]
    before = reference_layer(layer)
    assert _changed(before, reference_layer(layer)) == set()
    weight = layer.self_attn.q_proj.weight.data  # type: ignore[union-attr]
    weight.view(torch.int16).view(-1)[0] = 0x7F81
    signalling = reference_layer(layer)
    weight.view(torch.int16).view(-1)[0] = 0x7FC1
    assert _changed(signalling, reference_layer(layer)) == {"self_attn.q_proj"}


def _changed(before: LayerReference, after: LayerReference) -> set[str]:
    assert after.packed.keys() == before.packed.keys()
    return {name for name, sums in after.packed.items() if not torch.equal(sums, before.packed[name])}


def test_the_checksum_of_packed_bytes_notices_what_is_changed_and_what_is_moved() -> None:
    values = torch.randint(0, 256, (40_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sums = sharding._checksum(values).tolist()
    for place in (0, 1, 8_191 * 4, 40_000):
        other = values.clone()
        other[place] ^= 1
        assert all(one != two for one, two in zip(sharding._checksum(other).tolist(), sums, strict=True))
    for moved in (values.roll(4), values.flip(0), torch.cat([values[8_191 * 4 :], values[: 8_191 * 4]])):
        assert sharding._checksum(moved).tolist() != sums
    assert sharding._checksum(values.clone()).tolist() == sums


# what a wrapped model answers, scores and trains --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "allowed", "too_much"), [(torch.float32, 0.0, 1e-6), (torch.bfloat16, 9e-3, 2e-2)]
)
def test_a_wrapped_model_that_answers_otherwise_is_noticed(
    dtype: torch.dtype, allowed: float, too_much: float
) -> None:
    answers = torch.zeros(1, 4)
    check_logits(answers, answers + allowed, dtype)
    for other in (answers + too_much, answers + float("nan")):
        with pytest.raises(RunError, match="wrapping changed its outputs"):
            check_logits(answers, other, dtype)


def test_ranks_with_another_adapter_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"lora_A": nn.Parameter(torch.ones(2))}
    check_same_adapters(parameters)
    monkeypatch.setattr("trainer.checks.training.gather_objects", lambda mine: [mine, mine, "other", mine])
    with pytest.raises(
        RunError, match=r"rank 2: resumed with another adapter than rank 0 \(1 ranks differ\)"
    ):
        check_same_adapters(parameters)


@pytest.mark.parametrize("sharing", [False, True])
def test_the_first_micro_batch_says_what_is_scored_and_refuses_any_other_mask(
    world: Path, sharing: bool
) -> None:
    """`sharing`: what both prompts begin with stands once."""
    recipe = _recipe(world)
    processor = load_processor(recipe)
    rows = [
        question_row([chart_png(1)], "why?", ["because " * 60 + "of it . "], 0),
        question_row([chart_png(2)], "how high?", ["7"], 1),
    ]
    tokenizer = processor.tokenizer

    def packed(loss: str) -> tuple[ModelInputs, list[tuple[str, ...] | None]]:
        encoder = Encoder(processor, recipe.data.system_message, loss)
        inputs = pack(
            [encoder(row) for row in rows],
            sample_ids=(0, 1),
            step=0,
            masked=False,
            image_token_id=processor.image_token_id,
            merge=2,
            prefixes=[len(encoder.shared_prefix) if sharing else 0] * 2,
        )
        assert (len(inputs["whole_rows"]) > 0) == (sharing and loss == "answer")
        return inputs, [encoder.scored_texts(row) for row in rows]

    # As some tokenizers are saved; what a model answers loses blanks by it, the targets do not.
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    inputs, scored = packed("answer")
    assert scored == [(f"{rows[0].label[0]}<|im_end|>\n",), ("7<|im_end|>\n",)]
    targets, tokens = inputs["shift_labels"].numel(), sum(inputs["text_lengths"])
    assert targets > tokens / 2  # long answers are no fault
    said = describe_targets(inputs, (4, 9), scored, tokenizer)
    assert said.startswith(f"first micro-batch: {targets} of {tokens} tokens are targets (")
    assert said.endswith("the last '\\n'")
    whole, all_but_first = packed("sequence")
    assert f"{tokens - 2} of {tokens} tokens" in describe_targets(whole, (4, 9), all_but_first, tokenizer)

    def spoilt(keep: list[int]) -> dict[str, Any]:
        labels, places = inputs["shift_labels"], inputs["scored_positions"]
        return {**inputs, "shift_labels": labels[:, keep], "scored_positions": places[keep]}

    count = list(range(targets))
    for mask in (count[1:], count[:-1], [*count[:5], *count[6:]], count[:-3], []):
        with pytest.raises(RunError, match=r"data\.loss: sample [49] scores"):
            describe_targets(spoilt(mask), (4, 9), scored, tokenizer)
    shifted = {**inputs, "scored_positions": inputs["scored_positions"] - 1}
    other = {**inputs, "shift_labels": inputs["shift_labels"].flip(1)}
    for wrong in (whole, shifted, other):
        with pytest.raises(RunError, match=r"data\.loss: sample 4 scores"):
            describe_targets(wrong, (4, 9), scored, tokenizer)
    with pytest.raises(RunError, match=r"data\.loss: sample 4 scores .* where all but the first should be"):
        describe_targets(inputs, (4, 9), all_but_first, tokenizer)


def _adapters() -> dict[str, nn.Parameter]:
    return {f"q.{part}.default.weight": nn.Parameter(torch.ones(2)) for part in ("lora_A", "lora_B")}


def test_an_adapter_without_a_gradient_and_a_lora_b_with_none_but_zeros_are_noticed() -> None:
    parameters = _adapters()
    a, b = parameters.values()
    witness = GradientCheck(parameters)
    (a * 0 + b).sum().backward()  # as in the first step of all: lora_B is zero, so lora_A's gradient is
    witness.check()
    assert not a._backward_hooks
    witness = GradientCheck(parameters)
    b.sum().backward()
    with pytest.raises(
        RunError, match=r"1 of 2 adapters got no gradient in the first step, such as q\.lora_A"
    ):
        witness.check()
    witness = GradientCheck(parameters)
    (a + b * 0).sum().backward()
    with pytest.raises(
        RunError, match=r"1 of 2 adapters got a gradient of zero in the first step, such as q\.lora_B"
    ):
        witness.check()


def test_a_rank_of_fillers_alone_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = _adapters()
    witness = GradientCheck(parameters)
    sum(parameter.sum() * 0 for parameter in parameters.values()).backward()  # type: ignore[union-attr]
    monkeypatch.setattr(
        "trainer.checks.training.gather_objects", lambda mine: [mine, dict.fromkeys(mine, 1.0)]
    )
    witness.check()


def test_a_step_that_was_taken_with_gradients_that_are_no_numbers_is_an_error() -> None:
    check_step_taken(1.0, 3)
    for norm in (float("nan"), float("inf")):
        with pytest.raises(RunError, match="step 3: the gradient norm is"):
            check_step_taken(norm, 3)
