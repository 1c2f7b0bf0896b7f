"""Products of 8 bits: their rounding, that it is a token's own, and the layers and kernels that use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe.fp8_layers import layers_in_8_bits
from launch.recipe.loading import dump_recipe, find_recipe, load_recipe, recipe_from_dict
from tests.conftest import recipe_values
from trainer.data.encoder import Encoder
from trainer.data.packing import pack
from trainer.data.splits import open_split
from trainer.metrics_log import read_lines
from trainer.model import fused
from trainer.model.base import load_base, prepare_training
from trainer.model.fp8 import (
    E4M3,
    Fp8Linear,
    Fp8Rows,
    backward_product,
    forward_product,
    frozen_linears,
    is_fp8,
    quantize_rows,
    use_fp8_products,
)
from trainer.model.fp8_mlp import add_norm_mlp, takes_mlp
from trainer.model.lora import add_lora, trainable_parameters
from trainer.pretrained import load_processor
from trainer.train import main as train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LOST_CARRIES = 0.1
"""How far Triton 3.8's interpreter may be off: it loses a carry when it rounds to e4m3."""


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * 3).to(DEVICE, DTYPE)


def _values(rows: Fp8Rows) -> torch.Tensor:
    return rows.values.float() * rows.scales


def test_a_row_is_rounded_by_its_own_largest_number_and_by_no_other_row() -> None:
    x = _random(40, 48)
    x[3] *= 1000
    x[7] = 0
    rows = quantize_rows(x)
    alone = quantize_rows(x[5:6])
    assert torch.equal(rows.values[5:6].float(), alone.values.float())
    assert torch.equal(rows.scales[5:6], alone.scales)
    assert not _values(rows)[7].any()
    assert (rows.values.float().abs().amax(1)[:7] == 448).all()
    apart = (_values(rows) - x.float()).norm(dim=1) / x.float().norm(dim=1).clamp_min(1e-9)
    assert 0.01 < apart.max() < 0.04


def test_products_both_ways_are_those_of_the_rounded_matrices() -> None:
    x, weight, gradient, bias = (
        _random(24, 64),
        _random(32, 64, seed=1),
        _random(24, 32, seed=2),
        _random(32, seed=3),
    )
    rows = quantize_rows(weight)
    found = forward_product(quantize_rows(x), rows, bias, DTYPE)
    close = {"rtol": 1e-5, "atol": 1e-4} if DEVICE.type == "cpu" else {"rtol": 1e-2, "atol": 1.0}
    torch.testing.assert_close(
        found, (_values(quantize_rows(x)) @ _values(rows).t() + bias).to(DTYPE), **close
    )
    of_x = backward_product([gradient], [rows])
    scaled = quantize_rows(gradient, rows.scales.view(-1))
    torch.testing.assert_close(of_x, (_values(scaled) @ rows.values.float()).to(DTYPE), **close)
    exact = gradient.float() @ weight.float()
    assert 0.01 < (of_x.float() - exact).norm() / exact.norm() < 0.06


def test_the_kernels_round_as_the_plain_form_does() -> None:
    """Widths below and above a tile. Triton 3.8's interpreter loses a carry when it rounds to e4m3: values on a GPU."""
    from trainer.model.fp8_kernels import quantize_rows as by_kernel
    from trainer.model.fp8_kernels import transposed

    for columns in (200, 5000):
        x = torch.randn(6, columns, generator=torch.Generator().manual_seed(4))
        factors = torch.rand(columns, generator=torch.Generator().manual_seed(5))
        for each in (None, factors):
            values, scales = by_kernel([x.to(DEVICE)], None if each is None else [each.to(DEVICE)])
            expected = quantize_rows(x, each)
            torch.testing.assert_close(scales.cpu(), expected.scales, rtol=0, atol=0)
            if DEVICE.type == "cuda":
                assert torch.equal(values.cpu().view(torch.uint8), expected.values.view(torch.uint8))
            turned = transposed([expected.values.to(DEVICE)]).cpu().view(torch.uint8)
            assert torch.equal(turned, expected.values.view(torch.uint8).t())


def test_matrices_side_by_side_are_quantized_as_one_and_turned_over_as_one() -> None:
    from trainer.model.fp8_kernels import quantize_rows as by_kernel
    from trainer.model.fp8_kernels import transposed

    parts = [_random(6, columns, seed=columns) for columns in (200, 40, 24)]
    factors = [torch.rand(part.shape[1]).to(DEVICE) for part in parts]
    values, scales = by_kernel(parts, factors)
    whole = quantize_rows(torch.cat(parts, 1).cpu(), torch.cat(factors).cpu())
    torch.testing.assert_close(scales.cpu(), whole.scales, rtol=0, atol=0)
    found, expected = values.cpu().float(), whole.values.float()
    assert (found - expected).norm() <= (0 if DEVICE.type == "cuda" else LOST_CARRIES) * expected.norm()
    turned = transposed([quantize_rows(part.t().contiguous()).values for part in parts])
    expected = torch.cat([quantize_rows(part.t().contiguous()).values.float() for part in parts]).t()
    assert torch.equal(turned.float(), expected)


def test_norm_and_mlp_in_passes_that_quantize_are_those_one_after_another(world: Path) -> None:
    """Bit by bit forward on a GPU; backward, gate and up share a scale there."""
    language = _language(_model(_recipe(world, packed=False, targets=["q_proj"]), DEVICE))
    layer = language.layers[0].to(DTYPE)
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    assert not takes_mlp(mlp)
    use_fp8_products(language.layers, DTYPE, resident=True)
    assert takes_mlp(mlp)
    attended, residual = (_random(1, 21, language.config.hidden_size, seed=seed) for seed in (2, 3))

    def run(compute: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaves = attended.clone().requires_grad_(), residual.clone().requires_grad_()
        output = compute(*leaves)
        output.sin().sum().backward()
        one, other = (leaf.grad for leaf in leaves)
        assert one is not None
        assert other is not None
        return output.detach(), one, other

    def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x + y
        return total + mlp(norm(total))

    mine = run(lambda x, y: add_norm_mlp(x, y, norm, mlp))
    theirs = run(apart)
    gpu = DEVICE.type == "cuda"
    for one, other, close in zip(
        mine, theirs, (1e-6, 5e-2, 5e-2) if gpu else [LOST_CARRIES] * 3, strict=True
    ):
        assert (one.float() - other.float()).norm() < close * other.float().norm()


def _recipe(
    world: Path,
    *,
    packed: bool,
    products: str = "fp8",
    first: int | str = "auto",
    targets: Sequence[str] = ("q_proj", "v_proj", "up_proj"),
) -> Any:
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = packed
    values["model"] |= {"products": products, "num_layers_at_start_in_bf16": first}
    values["lora"] = {"lora_dropout": 0.0, "target_modules": list(targets)}
    return recipe_from_dict(values)


def _model(recipe: Any, device: torch.device = torch.device("cpu")) -> Any:  # noqa: B008
    model = add_lora(load_base(recipe, device), recipe).train()
    draw = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / 10)
    return model


def _language(model: Any) -> Any:
    return model.get_base_model().model.language_model


def test_the_frozen_linear_layers_of_the_decoder_layers_compute_in_8_bits_and_no_others(world: Path) -> None:
    recipe = _recipe(world, packed=True)
    model = _model(recipe)
    said = prepare_training(model, recipe, resident_weights=True)
    assert "8 bits" in said
    base = model.get_base_model()
    in_8_bits = {name for name, module in base.named_modules() if isinstance(module, Fp8Linear)}
    layers = base.config.get_text_config().num_hidden_layers
    assert len(in_8_bits) == 7 * layers
    assert all(".layers." in name and "lora" not in name for name in in_8_bits)
    for name in in_8_bits:
        assert base.get_submodule(name).weight.dtype == torch.uint8


@pytest.mark.parametrize("packed", [True, False])
def test_weights_that_are_held_in_8_bits_give_the_bits_of_those_quantized_in_every_pass(
    world: Path, packed: bool
) -> None:
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(2))
    found = []
    for resident in (True, False):
        language = _language(_model(_recipe(world, packed=packed)))
        x = torch.randn(1, 9, language.config.hidden_size, generator=torch.Generator().manual_seed(2))
        use_fp8_products(language.layers, torch.float32, resident=resident)
        leaf = x.clone().requires_grad_()
        output = language.layers[0].mlp(leaf)
        output.sin().sum().backward()
        found.append((output.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]


@pytest.mark.parametrize("resident", [True, False])
def test_fused_linear_layers_take_the_same_products(world: Path, resident: bool) -> None:
    """Through Triton's kernels where there is a GPU, so in its dtype."""
    model = _model(_recipe(world, packed=True), DEVICE)
    language = _language(model)
    for layer in language.layers:
        layer.to(DTYPE)
    use_fp8_products(language.layers, DTYPE, resident=resident)
    layer = language.layers[0]
    group = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    x = _random(1, 21, language.config.hidden_size, seed=2)

    def run(compute: Any) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        outputs = compute(leaf)
        sum(output.sin().sum() for output in outputs).backward()
        found = [each.grad for each in trainable_parameters(model).values() if each.grad is not None]
        model.zero_grad()
        assert leaf.grad is not None
        return [*(output.detach() for output in outputs), leaf.grad, *found]

    mine = run(lambda leaf: fused.linears(leaf, group))
    theirs = run(lambda leaf: [module(leaf) for module in group])
    assert len(mine) == len(theirs) == 3 + 1 + 4
    for place, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        close = 1e-4 if DEVICE.type == "cpu" else 3e-2  # rounding may move a number to the next of 8 bits
        if place == 3:
            close = 6e-2  # a token's gradients into the three share a scale
        assert (one.float() - other.float()).norm() < close * other.float().norm()


def test_a_packed_micro_batch_has_the_losses_of_its_samples_alone_and_nearly_those_of_bf16(
    world: Path,
) -> None:
    """What differs in the last bit of fp32 may be rounded to another of the 8-bit numbers."""
    values = _recipe(world, packed=True)
    processor = load_processor(values)
    encoder, rows = Encoder(processor, values.data.system_message, "answer"), open_split(values, "train")
    samples = [encoder(rows[number]) for number in range(4)]

    def losses(model: Any, *groups: list[int]) -> torch.Tensor:
        packed = [
            pack(
                [samples[number] for number in ids],
                sample_ids=ids,
                step=0,
                masked=False,
                image_token_id=processor.image_token_id,
                merge=2,
            )
            for ids in groups
        ]
        with torch.no_grad():
            return -torch.cat([model(**inputs).log_probs[0] for inputs in packed])

    found = {}
    for products, first in (("fp8", 0), ("fp8", 1), ("bf16", 0)):
        recipe = _recipe(world, packed=True, products=products, first=first)
        model = _model(recipe)
        prepare_training(model, recipe)
        found[products, first] = losses(model, [0, 1, 2, 3]), losses(model, [0], [1, 2], [3])
    in_bf16 = found.pop(("bf16", 0))[0]
    for together, apart in found.values():
        torch.testing.assert_close(together, apart, rtol=5e-3, atol=5e-3)
        assert together.mean() == pytest.approx(float(in_bf16.mean()), rel=1e-2)
        assert not torch.equal(together, in_bf16)
    assert not torch.equal(found["fp8", 0][0], found["fp8", 1][0])


def test_every_frozen_linear_layer_is_listed_once(world: Path) -> None:
    language = _language(_model(_recipe(world, packed=False)))
    found = frozen_linears(language.layers)
    assert len({id(layer) for _, _, layer in found}) == len(found) == 7 * len(language.layers)


def test_the_first_layers_are_not_in_8_bits(world: Path) -> None:
    def layers(count: int, *overrides: str) -> list[int]:
        recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"), ["model.products=fp8", *overrides])
        return list(layers_in_8_bits(recipe.model, count))

    first = "model.num_layers_at_start_in_bf16"
    assert [layers(count)[0] for count in (2, 7, 28, 80)] == [0, 1, 4, 4]
    assert layers(28) == list(range(4, 28))
    assert layers(3, f"{first}=2") == [2]
    assert layers(2, f"{first}=9") == layers(2, "model.products=bf16") == []
    recipe = _recipe(world, packed=True, products="fp8", first=1)
    model = _model(recipe)
    prepare_training(model, recipe)
    in_8_bits = [is_fp8(layer.self_attn.o_proj) for layer in _language(model).layers]
    assert in_8_bits == [False] + [True] * (len(in_8_bits) - 1)


def test_e4m3_has_the_largest_number_that_scales_are_made_for() -> None:
    assert torch.finfo(E4M3).max == 448


def _write(file: Path, world: Path, products: str, first: int | str, steps: int) -> str:
    values = recipe_values(world)
    values["model"] |= {"products": products, "num_layers_at_start_in_bf16": first}
    if torch.cuda.is_available():  # GPUs have these products for bfloat16 alone
        values["model"]["dtype"] = values["quantization"]["bnb_4bit_compute_dtype"] = "bfloat16"
    values["training"]["max_steps"], values["checkpoint"]["every_steps"] = steps, 1
    file.write_text(dump_recipe(recipe_from_dict(values)))
    return str(file)


def test_a_run_with_products_of_8_bits_is_nearly_that_of_bf16_and_goes_on_with_its_own_alone(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of two keeps its products."""
    losses = {}
    for products in ("bf16", "fp8"):
        file = _write(tmp_path / f"{products}.yaml", world, products, 1, 3)
        assert train([file, "--runs-dir", str(tmp_path), "--name", products]) == 0
        losses[products] = [line["loss"] for line in read_lines(tmp_path / products / "metrics.jsonl")]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=1e-2)
    assert losses["fp8"] != losses["bf16"]
    capsys.readouterr()
    changed = [str(tmp_path / "bf16.yaml"), "--runs-dir", str(tmp_path), "--name", "fp8"]
    longer = ["--set", "training.max_steps=4", "--allow", "training.max_steps"]
    assert train([*changed, *longer]) == 2
    assert "model.products: the run has 'fp8'" in capsys.readouterr().err
    assert train([*changed, *longer, "--allow", "model.products"]) == 0


def test_a_run_of_a_version_with_all_layers_in_8_bits_goes_on_with_them(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = _write(tmp_path / "begun.yaml", world, "fp8", 0, 1)
    assert train([begun, "--runs-dir", str(tmp_path), "--name", "older"]) == 0
    own = tmp_path / "older" / "recipe.yaml"
    own.write_text(
        "".join(line for line in own.read_text().splitlines(keepends=True) if "_at_start_" not in line)
    )
    assert load_recipe(own).model.num_layers_at_start_in_bf16 == 0
    now = _write(tmp_path / "now.yaml", world, "fp8", "auto", 2)
    request = [now, "--runs-dir", str(tmp_path), "--name", "older", "--allow", "training.max_steps"]
    capsys.readouterr()
    assert train(request) == 2
    expected = "model.num_layers_at_start_in_bf16: the run has 0, the recipe 'auto'"
    assert expected in capsys.readouterr().err
    assert train([*request, "--set", "model.num_layers_at_start_in_bf16=0"]) == 0
