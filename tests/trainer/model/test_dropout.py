"""Dropout masks belong to the sample: exact, the same in every layout, and as random as they should be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from launch.errors import ConfigError, RunError
from launch.inputs.model_shape import LAYER_LINEARS, LAYERS, unreached
from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from trainer.model.base import load_base
from trainer.model.dropout import (
    DropoutKeys,
    SampleDropout,
    _mix,
    keep_mask,
    module_keys,
    row_keys,
    token_keys,
)
from trainer.model.lora import add_lora

Q, V = "layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"
HALF = 1 << 15  # of 65536 draws


def mask(
    sample: int = 3,
    seed: int = 42,
    step: int = 7,
    module: str = Q,
    *,
    tokens: int = 2000,
    channels: int = 1024,
    dropped: int = HALF,
) -> Tensor:
    """The mask of one sample's tokens in one module."""
    keys = token_keys(seed, step, torch.full((tokens,), sample), torch.arange(tokens))
    return keep_mask(row_keys(keys, module_keys([module]))[0], channels, dropped)


# --- what exactly is computed -------------------------------------------------------------------------------------


def written_out(seed: int, step: int, sample: int, position: int, module: str, channel: int) -> int:
    """The draw of one value, from the published algorithms, in whole numbers of Python: 0 to 65535."""

    def named(text: str) -> int:
        return int.from_bytes(hashlib.sha256(f"samestep/dropout/{text}".encode()).digest()[:8], "big")

    def splitmix64(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def lowbias32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    start = splitmix64(named(f"step/{seed}/{step}") ^ sample)
    token = splitmix64((start + position * 0x9E3779B97F4A7C15) % 2**64)
    row = splitmix64(token ^ named(f"module/{module}")) | 1
    word = ((row % 2**32) * lowbias32(channel // 2 + 1) + (row >> 32)) % 2**32
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32
    word ^= word >> 16
    return word >> 16 if channel % 2 else word % 2**16


def test_the_mask_is_the_documented_function_to_the_bit() -> None:
    samples = [0, 5, 5, 28_298, 2**40]
    positions = [0, 0, 1, 900, 31_000]
    for seed, step, module, channels, dropped in [
        (42, 0, Q, 64, 3277),
        (0, 10**6, V, 65, 1),
        (7, 12, "layers.27.mlp.down_proj", 333, HALF),
        (7, 13, Q, 2, 65535),
    ]:
        keys = token_keys(seed, step, torch.tensor(samples), torch.tensor(positions))
        found = keep_mask(row_keys(keys, module_keys([module]))[0], channels, dropped)
        for row, (sample, position) in enumerate(zip(samples, positions, strict=True)):
            draws = [written_out(seed, step, sample, position, module, c) for c in range(channels)]
            # As signed numbers of 16 bits the lowest `dropped` are dropped: 32768 and up come first.
            expected = [(draw + HALF) % 2**16 >= dropped for draw in draws]
            assert found[row].tolist() == expected


def test_the_generator_behind_it_is_splitmix64() -> None:
    """The first numbers of SplitMix64 from 1234567, as its users publish them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = 1234567
    for number in published:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        signed = torch.tensor([state - 2**64 if state >> 63 else state])
        assert int(_mix(signed)) % 2**64 == number


# --- sameness -----------------------------------------------------------------------------------------------------


def packed_mask(samples: list[tuple[int, int]], step: int = 7) -> list[Tensor]:
    """The masks of (sample, tokens) that lie end to end in one row, in the second of two modules."""
    ids = torch.cat([torch.full((tokens,), sample) for sample, tokens in samples])
    positions = torch.cat([torch.arange(tokens) for _, tokens in samples])
    rows = DropoutKeys(42, [V, Q]).of(step, ids, positions)
    return list(keep_mask(rows[1], 192, 3277).split([tokens for _, tokens in samples]))


def test_a_sample_has_the_same_mask_in_every_packing() -> None:
    alone = {sample: packed_mask([(sample, 40 + sample)])[0] for sample in range(6)}
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 4], [4, 2, 2]):
        for sample, found in zip(order, packed_mask([(s, 40 + s) for s in order]), strict=True):
            assert torch.equal(found, alone[sample])
    assert torch.equal(packed_mask([(3, 20)])[0], alone[3][:20])  # its beginning, whatever its length


def test_modules_that_train_beside_it_do_not_change_a_module() -> None:
    ids, positions = torch.full((50,), 3), torch.arange(50)
    alone = DropoutKeys(42, [Q]).of(7, ids, positions)[0]
    assert torch.equal(DropoutKeys(42, ["layers.0.mlp.up_proj", V, Q]).of(7, ids, positions)[2], alone)


def test_wider_activations_have_the_same_first_channels() -> None:
    assert torch.equal(mask(channels=1024)[:, :101], mask(channels=101))


# --- randomness: fixed inputs, bounds of 4 standard deviations -------------------------------------------------------


def sigmas_apart(one: Tensor, other: Tensor) -> float:
    """How far the correlation of two masks that drop half lies from none, in standard deviations."""
    agree = (one == other).double().mean().item()
    return abs(agree - 0.5) * 2 * one.numel() ** 0.5


@pytest.mark.parametrize("dropped", [3277, HALF, 19_661])
def test_the_share_that_is_dropped_is_the_share_asked_for(dropped: int) -> None:
    found = (~mask(tokens=4000, channels=2048, dropped=dropped)).double()
    share = dropped / 65536
    deviation = (share * (1 - share)) ** 0.5
    assert abs(found.mean().item() - share) < 4 * deviation / found.numel() ** 0.5
    for dim, others in ((0, 4000), (1, 2048)):  # every channel, every token: none far off, none too even
        scores = (found.mean(dim) - share) * others**0.5 / deviation
        assert scores.abs().max() < 5
        assert abs(scores.square().mean() - 1) < 4 * (2 / len(scores)) ** 0.5


def test_masks_of_other_seeds_steps_samples_and_modules_are_independent() -> None:
    here = mask()
    others = {
        "seed": mask(seed=43),
        "step": mask(step=8),
        "step far": mask(step=7 + 2**20),
        "sample": mask(sample=4),
        "sample far": mask(sample=3 + 2**32),
        "module": mask(module=V),
        "layer": mask(module="layers.1.self_attn.q_proj"),
        "seed and step swapped": mask(seed=7, step=42),
    }
    for name, other in others.items():
        assert sigmas_apart(here, other) < 4, name


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 500])
def test_neighbouring_tokens_and_channels_are_independent(distance: int) -> None:
    here = mask()
    assert sigmas_apart(here[distance:], here[:-distance]) < 4
    assert sigmas_apart(here[:, distance:], here[:, :-distance]) < 4
    assert sigmas_apart(here[distance:, distance:], here[:-distance, :-distance]) < 4
    # Two tokens and two channels together: what a mask made of a row part and a column part would fail.
    squares = here[distance:] ^ here[:-distance]
    assert sigmas_apart(squares[:, distance:], squares[:, :-distance]) < 4


def test_every_pair_of_channels_and_every_pair_of_tokens_is_independent() -> None:
    signs = mask(tokens=1024, channels=1024).float() * 2 - 1
    for products in (signs @ signs.T, signs.T @ signs):
        scores = products[torch.ones(1024, 1024, dtype=torch.bool).triu(1)] / 32
        assert scores.abs().max() < 6  # of 523,776 normal numbers, one beyond 6 in a thousand trials
        assert abs(scores.mean()) < 4 / len(scores) ** 0.5
        assert abs(scores.square().mean() - 1) < 4 * (2 / len(scores)) ** 0.5


def test_all_patterns_of_eight_neighbours_are_equally_frequent() -> None:
    here = mask(channels=1024).long()
    weights = 2 ** torch.arange(8)
    along_channels = here.unflatten(1, (-1, 8)) @ weights
    along_tokens = here.T.unflatten(1, (-1, 8)) @ weights
    for patterns in (along_channels, along_tokens):
        counts = torch.bincount(patterns.flatten(), minlength=256).double()
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert abs(chi_square - 255) < 4 * (2 * 255) ** 0.5


def test_no_two_tokens_of_a_step_have_one_mask() -> None:
    samples, positions = torch.arange(200).repeat_interleave(100), torch.arange(100).repeat(200)
    rows = row_keys(token_keys(42, 7, samples, positions), module_keys([Q, V])).flatten(0, 1)
    assert len(torch.unique(rows, dim=0)) == 40_000
    assert len(torch.unique(keep_mask(rows, 128, HALF), dim=0)) == 40_000


# --- the module ---------------------------------------------------------------------------------------------------


def dropout(p: float, tokens: int) -> SampleDropout:
    """A module in training mode, handed the keys of one sample of `tokens`."""
    keys = DropoutKeys(42, [Q])
    keys.current = keys.of(7, torch.full((tokens,), 3), torch.arange(tokens))
    return SampleDropout(p, Q, 0, keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_mask_times_the_scale(dtype: torch.dtype) -> None:
    module = dropout(0.3, 60)
    scale = 65536 / (65536 - 19661)  # 0.3 as 16 bits draw it
    expected = mask(tokens=60, channels=96, dropped=19661).float() * scale
    torch.manual_seed(0)
    for shape in ((60, 96), (1, 60, 96)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        weight = torch.randn(shape).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        assert y.shape == shape
        torch.testing.assert_close(y, (x.float() * expected).to(dtype), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(y, x, weight)
        torch.testing.assert_close(gradient, (weight.float() * expected).to(dtype), rtol=0, atol=0)


def test_the_expectation_is_kept_in_bfloat16_too() -> None:
    """A mask in bf16 would hold 1 / 0.95 as 1.0547: 0.2 % more than it is, 14 standard deviations here."""
    x = torch.randn(4000, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = dropout(0.05, 4000)(x).double()
    x = x.double()
    deviation = (x.pow(4).sum() * 0.05 / 0.95).sqrt() / x.square().sum()
    assert abs((x * y).sum() / x.square().sum() - 1) < 4 * deviation


def test_evaluation_and_a_share_of_zero_change_nothing() -> None:
    x = torch.randn(5, 8)
    assert dropout(0.3, 60).eval()(x) is x
    assert dropout(0.0, 60)(x) is x


@pytest.mark.parametrize(("share", "kept"), [(1e-9, 65535), (0.999999, 1)])
def test_an_extreme_share_still_drops_something_and_keeps_something(share: float, kept: int) -> None:
    assert 65536 - dropout(share, 1).dropped == kept


def test_a_layer_without_the_keys_of_its_tokens_is_refused() -> None:
    module = dropout(0.3, 60)
    with pytest.raises(RunError, match=r"q_proj is given 59 tokens, and keys for 60;"):
        module(torch.randn(59, 8))
    module.keys.take(module, (), {})  # a layer that was called without them
    with pytest.raises(
        RunError, match=r"lora\.lora_dropout: layers\.0\.self_attn\.q_proj runs in training mode"
    ):
        module(torch.randn(60, 8))


# --- where LoRA may lie -------------------------------------------------------------------------------------------


def lora_model(world: Path, targets: Any) -> Any:
    values = recipe_values(world)
    values["lora"] = {"target_modules": targets, "lora_dropout": 0.1}
    recipe = recipe_from_dict(values)
    return add_lora(load_base(recipe, torch.device("cpu")), recipe)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "lm_head"], r"reaches outside the decoder layers .*\(1 modules: lm_head\); name"),
        (["embed_tokens"], r"reaches outside the decoder layers .* model\.language_model\.embed_tokens\)"),
        (["q_proj", "w_proj"], r"w_proj names no layer of the model \(2 layers are reached"),
        (["w_proj"], r"\['w_proj'\] \(No modules were targeted"),
    ],
)
def test_lora_that_would_not_train_is_refused(world: Path, targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^lora\.target_modules: .*{message}"):
        lora_model(world, targets)


def test_all_linear_reaches_every_linear_layer_of_the_decoder_and_no_other(world: Path) -> None:
    model = lora_model(world, "all-linear").get_base_model()
    trained = {name.split(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A." in name}
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert trained == {
        f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in (*linear, *mlp)
    }


def test_what_lora_reaches_is_judged_without_the_model_as_with_it(world: Path) -> None:
    config = AutoConfig.from_pretrained(world / "base")
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    inside = set(model.model.language_model.layers.modules())
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part in inside]
    layers = config.get_text_config().num_hidden_layers
    assert sorted(linears) == sorted(f"{LAYERS}.{n}.{name}" for n in range(layers) for name in LAYER_LINEARS)
    ends = {name[start:] for name, _ in model.named_modules() for start in range(len(name) + 1)}
    for name in ends | {"layers.2.mlp.up_proj", "00.mlp.up_proj", "qproj", "Q_PROJ", "q_proj ", "all-linear"}:
        reaches = any(linear == name or linear.endswith(f".{name}") for linear in linears)
        assert unreached([name], layers) == ([] if reaches else [name]), name
