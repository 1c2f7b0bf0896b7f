"""The fused linear layers with their LoRA against PEFT's own, in Triton's interpreter on a CPU or on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from trainer.model import frozen_mlp, fused
from trainer.model.base import load_base
from trainer.model.dropout import use_sample_dropout
from trainer.model.frozen_mlp import frozen_linears_of
from trainer.model.fused_linear import linears
from trainer.model.lora import add_lora, trainable_parameters

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOSE = (
    {"rtol": 1e-3, "atol": 1e-4} if DEVICE.type == "cpu" else {"rtol": 5e-2, "atol": 5e-2}
)  # TensorFloat32
TOKENS = 21


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_linear_layers_of_one_input_give_the_outputs_and_gradients_of_each_alone(
    world: Path, packed: bool, dropout: float
) -> None:
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = packed
    values["lora"] = {"lora_dropout": dropout, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    recipe = recipe_from_dict(values)
    model = add_lora(load_base(recipe, DEVICE), recipe).train()
    draw = torch.Generator().manual_seed(0)
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / 10)
    language: Any = model.get_base_model().model.language_model
    keys = use_sample_dropout(language, 1)
    if keys is not None:
        samples = torch.arange(TOKENS, device=DEVICE) // 5
        keys.current = keys.of(3, samples, torch.arange(TOKENS, device=DEVICE) % 5)
    layer = language.layers[0]
    groups = [
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
        (layer.self_attn.o_proj,),
    ]
    x = torch.randn(1, TOKENS, language.config.hidden_size, generator=draw).to(DEVICE)

    def run(compute: Any) -> list[torch.Tensor]:
        """Outputs, the gradient of the input and those of the adapters."""
        leaf = x.clone().requires_grad_()
        outputs = [output for group in groups for output in compute(leaf, group)]
        sum(((number + 1) * output.sin().sum() for number, output in enumerate(outputs))).backward()
        found = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        model.zero_grad()
        assert leaf.grad is not None
        return [*(output.detach() for output in outputs), leaf.grad, *found]

    mine = run(fused.linears)
    theirs = run(lambda leaf, group: [module(leaf) for module in group])
    assert len(mine) == len(theirs) == 6 + 1 + 6
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def plain_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of Liger's kernels, which take no number in Triton's interpreter."""
    deviations = (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    return x * deviations * weight, deviations.flatten()


def plain_norm_of_sum(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    """Likewise."""
    normed, deviations = plain_norm(x + residual, *rest)
    return normed, x + residual, deviations


@pytest.mark.parametrize(("count", "own"), [(1600, True), (1536, False)], ids=["many rows", "few rows"])
def test_a_layer_in_4_bits_gives_what_bitsandbytes_gives_and_leaves_it_few_rows(
    count: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=True)
    layer = layer.requires_grad_(False).to("cpu")
    x = torch.randn(1, count, 64, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0])]
    monkeypatch.setattr(fused, "linears", lambda *given: calls.append(1) or linears(*given))
    calls: list[int] = []
    fused.dequantize_in_one_launch(nn.Sequential(layer))
    outputs.append(layer(inputs[1]))
    assert calls == [1] * own
    for output in outputs:
        output.sin().sum().backward()
    assert torch.equal(*outputs)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)  # type: ignore[arg-type]


def test_norms_beside_residuals_give_the_outputs_and_gradients_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused, "norm_forward", plain_norm)
        monkeypatch.setattr(fused, "norm_of_sum_forward", plain_norm_of_sum)
    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 1, TOKENS, 48, generator=draw).to(DEVICE)
    weights = torch.randn(2, 48, generator=draw).to(DEVICE)

    def run(mine: bool, keep: bool) -> list[Any]:
        """`keep`: the sum is used after its norm too."""
        leaves = [side.clone().requires_grad_() for side in (x, residual)]
        if mine:
            first, total = fused._NormOfSum.apply(*leaves, weights[0], 1e-6)
            second, total = fused._Norm.apply(total, weights[1], 1e-6)
        else:
            total = leaves[0] + leaves[1]
            first, second = (plain_norm(total, weight, 1e-6)[0] for weight in weights)
        outputs = [first, second, total] if keep else [first, second]
        torch.stack([output.sin().sum() for output in outputs]).sum().backward()
        return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves)]

    for keep in (True, False):
        for found, expected in zip(run(True, keep), run(False, keep), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_queries_and_keys_are_turned_by_their_positions_as_transformers_does() -> None:
    heads, key_heads, width = 6, 2, 16
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE)

    projected = [random(1, TOKENS, count * width) for count in (heads, key_heads, key_heads)]
    cos, sin = (random(1, TOKENS, width // 2).repeat(1, 1, 2) for _ in range(2))

    def run(mine: bool) -> list[torch.Tensor]:
        leaves = [each.clone().requires_grad_() for each in projected]
        query, key, value = (leaf * 1 for leaf in leaves)  # the kernel writes over them
        if mine:
            outputs = fused._Rotated.apply(query, key, value, cos, sin, width)
        else:
            split = (each.view(1, TOKENS, -1, width).transpose(1, 2) for each in (query, key, value))
            query, key, value = split
            turned = *apply_rotary_pos_emb(query, key, cos, sin), value
            outputs = [each.squeeze(0).transpose(0, 1) for each in turned]
        torch.stack([output.sin().sum() for output in outputs]).sum().backward()
        return [
            *(output.detach() for output in outputs),
            *(leaf.grad for leaf in leaves if leaf.grad is not None),
        ]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_replaced_decoder_layer_recomputes_where_it_is_asked_to(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from_dict(recipe_values(world))
    language: Any = load_base(recipe, DEVICE).model.language_model
    calls: list[int] = []

    def computed(module: Any, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        calls.append(module.self_attn.layer_idx)
        return hidden.sin()  # needs its input in the backward pass

    monkeypatch.setattr(fused, "_decoder_layer", computed)
    for layer in language.layers:
        fused.replace(layer, fused.decoder_layer)
    language.train().activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    hidden = torch.ones(1, 3, 8, device=DEVICE, requires_grad=True)
    for layer in language.layers:
        hidden = layer(hidden)
    assert calls == list(range(len(language.layers)))
    hidden.pow(2).sum().backward()
    again = [number for number in reversed(range(len(language.layers))) if number % 2 == 0]
    assert calls[len(language.layers) :] == again


def test_a_model_without_decoder_layers_takes_the_fused_kernels(world: Path) -> None:
    """`samestep prepare --vision` loads the vision tower alone."""
    model = load_base(recipe_from_dict(recipe_values(world)), torch.device("cpu"))
    model.model.language_model.layers = torch.nn.ModuleList()
    fused.use_fused_kernels(model)
    assert model.model.language_model.norm.forward.__func__ is fused.rms_norm


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_of_the_tower_adds_residuals_within_other_passes_and_gives_what_the_plain_one_does(
    world: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last product in 4 bits too, which takes no addition."""
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = packed
    visual = load_base(recipe_from_dict(values), DEVICE).model.visual
    block: Any = visual.blocks[0]
    monkeypatch.setattr(block.attn, "forward", lambda hidden, **_: hidden / 2)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, block.norm1.weight.numel(), generator=draw).to(DEVICE, block.norm1.weight.dtype)
    with torch.no_grad():
        expected = block(x, cu_seqlens=None)
        torch.testing.assert_close(fused.vision_block(block, x), expected, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
def test_a_frozen_mlp_after_its_norm_gives_the_numbers_of_the_passes_one_after_another(
    world: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, forward and backward; with an adapter in it, or 8-bit products, the passes are taken."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused, "norm_of_sum_forward", plain_norm_of_sum)
        monkeypatch.setattr(frozen_mlp, "norm_of_sum_forward", plain_norm_of_sum)
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = packed
    layer: Any = (
        load_base(recipe_from_dict(values), DEVICE).model.language_model.layers[0].requires_grad_(False)
    )
    fused.replace(layer.mlp, fused.swiglu_mlp)
    hidden = layer.post_attention_layernorm.weight.numel()
    draw = torch.Generator().manual_seed(0)
    dtype = layer.post_attention_layernorm.weight.dtype
    sides = [torch.randn(1, TOKENS, hidden, generator=draw).to(DEVICE, dtype) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        leaves = [side.clone().requires_grad_() for side in sides]
        output = fused._after_attention(layer, *leaves)
        output.sin().sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    assert (frozen_linears_of(layer.mlp, sides[0]) is None) == packed  # few rows
    monkeypatch.setattr(frozen_mlp, "MANY_ROWS", 0)
    taken = run()
    assert frozen_linears_of(layer.mlp, sides[0]) is not None
    monkeypatch.setattr(fused, "frozen_linears_of", lambda mlp, x: None)
    apart = run()
    assert len(taken) == len(apart) == 3
    for found, expected in zip(taken, apart, strict=True):
        assert torch.equal(found, expected)
    layer.mlp.down_proj.fp8_products = True
    assert frozen_linears_of(layer.mlp, sides[0]) is None
