"""Bytes of a GPU by arithmetic, against what PyTorch holds and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.inputs.families import read_shape, shape_of
from launch.inputs.model_shape import ModelShape
from launch.planning.activations import attention_bytes, layer_activation_bytes
from launch.planning.memory import Memory, memory_of
from launch.planning.memory import trained_parameters as planned_parameters
from launch.planning.memory_load import Kernels, Load, Packed, Settings, load_of
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from launch.units import GIB
from tests.conftest import recipe_values
from tests.helpers.indexes import HUB_7B, SHAPE
from tests.helpers.saved import saved_bytes
from trainer.model.attention import use_packed_attention
from trainer.model.base import load_base
from trainer.model.dropout import use_sample_dropout
from trainer.model.lora import add_lora, trainable_parameters

FUSED = Kernels(fused=True, fused_lora=True)
EIGHT_SAMPLES = Packed(tokens=7000, visual_tokens=5950, scored_tokens=40, whole_tokens=7000)
REPEATED_KEYS_GIB = 28 * 7000 * 2 * 2 * (3584 - 512) / GIB
"""What the throwaway loop kept besides, a key and a value for every query head: layers, tokens, two tensors of bf16."""


def recipe_of(world: Path, dropout: float, targets: list[str] | str, *, load_in_4bit: bool = True) -> Recipe:
    values = recipe_values(world)
    values["model"]["dtype"] = "bfloat16"
    values["quantization"] = {"load_in_4bit": load_in_4bit}
    values["lora"] = {"lora_dropout": dropout, "target_modules": targets}
    return recipe_from_dict(values)


def shape_in(recipe: Recipe) -> ModelShape:
    shape = read_shape(recipe)
    assert isinstance(shape, ModelShape)
    return shape


@pytest.mark.parametrize(
    ("dropout", "targets"),
    [
        (0.05, ["q_proj", "v_proj"]),
        (0.0, ["q_proj", "v_proj"]),
        (0.3, "all-linear"),
        (0.0, ["k_proj", "up_proj", "down_proj"]),
    ],
)
def test_a_layer_is_planned_to_keep_the_bytes_that_autograd_saves(
    world: Path, dropout: float, targets: list[str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(world, dropout, targets)
    # PEFT 0.21 asks for a GPU's autocast and, not finding it, saves a copy of every LoRA's input.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    model = add_lora(load_base(recipe, torch.device("cpu")), recipe).train()
    base: Any = model.get_base_model()
    use_packed_attention(base)
    keys = use_sample_dropout(base.model.language_model, 1)
    load = load_of(recipe, shape_in(recipe), "single", 1, Kernels())
    try:
        saved = saved_bytes(model, keys, torch.device("cpu"))
    finally:
        torch.set_autocast_enabled("cpu", False)  # autocast leaves behind what it was told it found
    assert saved == pytest.approx(layer_activation_bytes(load) + attention_bytes(load), abs=1)
    count = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    assert planned_parameters(load) == count


def test_the_frozen_weights_are_counted_to_the_byte(world: Path) -> None:
    recipe = recipe_of(world, 0.05, ["q_proj"], load_in_4bit=False)
    held = sum(parameter.nbytes for parameter in load_base(recipe, torch.device("cpu")).parameters())
    load = load_of(recipe, shape_in(recipe), "single", 1, Kernels())
    assert memory_of(load, EIGHT_SAMPLES, Settings(False, 1)).base == held


def test_quantized_weights_are_counted_with_their_constants(world: Path) -> None:
    recipe = recipe_of(world, 0.05, ["q_proj"])
    model = load_base(recipe, torch.device("cpu"))
    held = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    load = load_of(recipe, shape_in(recipe), "single", 1, Kernels())
    assert memory_of(load, EIGHT_SAMPLES, Settings(False, 1)).base == pytest.approx(held, rel=2e-3)


def test_both_forms_of_config_json_are_understood() -> None:
    text = {key: value for key, value in HUB_7B.items() if key not in ("model_type", "vision_config")}
    assert shape_of({**HUB_7B, "text_config": text}) == SHAPE
    assert shape_of({k: HUB_7B[k] for k in ("model_type", "vision_config")} | {"text_config": text}) == SHAPE


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "llama"}, {"model_type": "qwen2_vl", "vision_config": {}}]
)
def test_a_base_of_another_kind_is_not_taken_for_one(
    world: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(tmp_path)
    assert "config.json cannot be read" in str(read_shape(recipe_from_dict(values)))
    values["model"]["name_or_path"] = "nobody/has-this"
    assert "samestep prepare" in str(read_shape(recipe_from_dict(values)))


def of_7b(settings: Settings, packed: Packed = EIGHT_SAMPLES, **load: Any) -> Memory:
    return memory_of(Load(SHAPE, **load), packed, settings)


def test_the_7b_base_takes_what_was_measured() -> None:
    """README: the layers are 3.1 of 5.5 GiB; 2,523,136 weights train."""
    whole, shared = of_7b(Settings(False, 1)), of_7b(Settings(False, 1), strategy="fsdp", world_size=28)
    assert whole.base / GIB == pytest.approx(5.5, abs=0.05)
    assert (whole.base - shared.base) / GIB == pytest.approx(3.1 * (1 - 5 / 28), abs=0.2)
    assert planned_parameters(Load(SHAPE)) == 2_523_136


@pytest.mark.parametrize(
    ("kernels", "settings", "measured"),
    [
        (Kernels(), Settings(False, 1), 9.1),
        (Kernels(), Settings(False, 0), 41.6 - REPEATED_KEYS_GIB),
        (Kernels(fused=True), Settings(False, 0), 31.8 - REPEATED_KEYS_GIB),
    ],
)
def test_peaks_of_eight_samples_a_pack_are_those_of_an_h100(
    kernels: Kernels, settings: Settings, measured: float
) -> None:
    """Of a throwaway loop on random weights, without our fused LoRA; its packs' tokens are not known exactly."""
    assert of_7b(settings, kernels=kernels).training / GIB == pytest.approx(measured, rel=0.05)


def test_settings_order_memory_as_they_should() -> None:
    peaks = [of_7b(Settings(False, every), kernels=FUSED).training for every in (1, 2, 4, 8, 0)]
    assert peaks == sorted(peaks)
    half = (peaks[0] + peaks[-1]) / 2
    assert peaks[1] == pytest.approx(half, rel=0.1)  # every 2nd of 28 layers
    resident = of_7b(Settings(True, 0), kernels=FUSED).training - peaks[-1]
    assert 9 * GIB < resident < 11 * GIB  # bf16 for 4 bits, of language model and tower
    in_8_bits = of_7b(Settings(True, 0), kernels=FUSED, fp8_layers=24).training - peaks[-1]
    assert (resident - in_8_bits) / GIB == pytest.approx(
        6.1 * 24 / 28, abs=0.1
    )  # a byte less for each weight


def test_sharding_saves_where_it_says() -> None:
    settings = Settings(False, 1)
    ddp, fsdp, zero3 = (of_7b(settings, strategy=s, world_size=8) for s in ("ddp", "fsdp", "zero3"))
    assert fsdp.loading == zero3.loading < ddp.loading
    assert fsdp.base == zero3.base < ddp.base
    kept = of_7b(Settings(False, 1, whole_layers=10), strategy="fsdp", world_size=8)
    assert (kept.base - fsdp.base) / GIB == pytest.approx(3.1 * 10 / 28, abs=0.1)
    assert ddp.reserved > ddp.training
