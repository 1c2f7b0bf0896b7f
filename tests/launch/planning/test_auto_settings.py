"""What `auto` becomes on which GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch import hardware
from launch.errors import ConfigError
from launch.inputs.families import shape_of
from launch.planning.auto_settings import (
    BatchStatistics,
    ChosenSettings,
    Gpus,
    batches_of,
    choose_auto_settings,
    parse_gpu_memory,
    recomputation,
)
from launch.planning.memory import memory_of
from launch.planning.memory_load import Load, Packed, Settings
from launch.planning.run_steps import work_of_samples
from launch.rules import request_rules
from launch.rules.request import PlanRequest
from launch.strategies import STRATEGIES
from launch.units import GIB
from tests.helpers.indexes import SHAPE, embedded_recipe, make_split
from tests.helpers.published_models import PUBLISHED

SAMPLES, EACH = 32, 800
DEFAULTS = (
    "model.dtype=bfloat16",
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "training.gradient_checkpointing=auto",
    "batch.micro_batch_tokens=auto",
    "lora.target_modules=[q_proj, v_proj]",
)
CHART_LIKE = BatchStatistics(
    longest=1200,
    step_tokens=SAMPLES * EACH,
    most_tokens=SAMPLES * EACH,
    visual=0.88,
    scored=0.02,
    own=1.0,
    prefix=0,
    count=lambda budget: -(-SAMPLES // (budget // EACH)),
)


def on(
    gigabytes: float | None, *overrides: str, strategy: str = "single", world_size: int = 1
) -> ChosenSettings:
    machine = Gpus("cuda", None if gigabytes is None else int(gigabytes * GIB))
    recipe = embedded_recipe(*DEFAULTS, *overrides)
    return choose_auto_settings(recipe, machine, SHAPE, strategy, world_size, CHART_LIKE)


def test_80_gb_hold_the_7b_weights_dequantized_and_half_a_step_without_recomputation() -> None:
    chosen = on(79.6)
    assert chosen.settings == Settings(keep_dequantized=True, activation_checkpoint_every=0)
    assert (CHART_LIKE.count(chosen.micro_batch_tokens), chosen.fits) == (2, True)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("strategy", "world_size"), [("single", 1), ("fsdp", 4), ("zero3", 4)])
def test_every_published_model_is_planned_on_80_gb(name: str, strategy: str, world_size: int) -> None:
    config, parameters = PUBLISHED[name]
    shape, machine = shape_of(config), Gpus("cuda", int(79.6 * GIB))
    chosen = choose_auto_settings(
        embedded_recipe(*DEFAULTS), machine, shape, strategy, world_size, CHART_LIKE
    )
    assert chosen.fits
    assert chosen.memory is not None
    assert chosen.memory.reserved <= 79.6 * GIB
    linear = shape.layers * shape.layer_weights + shape.tower_weights
    if strategy == "single" and not chosen.settings.keep_dequantized:
        # a half byte a weight, a constant for 64, one for 256 of those; the rest, tied once, in bfloat16
        quantized = linear / 2 * (1 + 2 / 64 * (1 + 4 / 256))
        assert chosen.memory.base == pytest.approx(quantized + 2 * (parameters - linear), rel=1e-3)
    elif strategy == "single":
        assert chosen.memory.base == 2 * parameters


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rules_settings_and_memory_agree_on_which_strategies_share_the_layers_out(strategy: str) -> None:
    shared = Load(SHAPE, strategy, world_size=2).shares == 2
    held = PlanRequest(embedded_recipe("model.resident_weights=true"), strategy, 1, 2, 8, 1, 400, 100)
    assert (request_rules.sharded_weights_stay_packed(held) is not None) == shared
    assert on(1000, strategy=strategy, world_size=2).settings.keep_dequantized == (not shared)


def test_24_gb_keep_4_bits_and_take_smaller_micro_batches() -> None:
    chosen = on(24)
    assert not chosen.settings.keep_dequantized
    assert chosen.micro_batch_tokens < on(79.6).micro_batch_tokens


@pytest.mark.parametrize("gigabytes", [9, 10])
def test_small_cards_recompute_everything(gigabytes: int) -> None:
    chosen = on(gigabytes)
    assert chosen.settings == Settings(keep_dequantized=False, activation_checkpoint_every=1)
    assert chosen.memory is not None
    assert chosen.memory.reserved <= gigabytes * GIB
    assert chosen.fits


@pytest.mark.parametrize("gigabytes", [10, 12, 16, 24, 40, 48, 79.6])
def test_what_is_chosen_fits_and_holds_no_more_than_it_needs(gigabytes: float) -> None:
    chosen = on(gigabytes)
    assert chosen.memory is not None
    assert chosen.memory.reserved <= gigabytes * GIB
    count = CHART_LIKE.count(chosen.micro_batch_tokens)
    assert chosen.micro_batch_tokens == max(1200, EACH * -(-SAMPLES // count))  # micro-batches of one size


def test_what_the_recipe_fixes_is_respected() -> None:
    chosen = on(
        79.6,
        "batch.micro_batch_tokens=5000",
        "training.gradient_checkpointing=2",
        "model.resident_weights=false",
    )
    assert (chosen.micro_batch_tokens, chosen.settings) == (5000, Settings(False, 2))
    assert on(
        79.6, "training.gradient_checkpointing=false", "batch.micro_batch_tokens=1300"
    ).settings == Settings(True, 0)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_sharded_weights_stay_packed(strategy: str) -> None:
    assert not on(79.6, strategy=strategy, world_size=8).settings.keep_dequantized


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_layers_stay_whole_as_far_as_they_fit(strategy: str) -> None:
    kept = {size: on(size, strategy=strategy, world_size=8).settings.whole_layers for size in (5, 6, 7, 79.6)}
    assert sorted(kept.values()) == [*kept.values()]
    assert kept[79.6] == SHAPE.layers
    assert on(79.6, strategy="ddp", world_size=8).settings.whole_layers == 0
    some = on(6.5, strategy=strategy, world_size=8)
    assert some.memory is not None
    assert some.memory.reserved <= 6.5 * GIB


def test_nothing_known_means_little_memory_and_says_so() -> None:
    chosen = on(None)
    assert (chosen.settings, chosen.micro_batch_tokens) == (Settings(False, 1), 4 * 1200)
    assert "--gpu-memory" in chosen.reason
    unknown = choose_auto_settings(
        embedded_recipe(*DEFAULTS),
        Gpus("cuda", 80 * GIB),
        "config.json is not here",
        "single",
        1,
        CHART_LIKE,
    )
    assert (unknown.settings, unknown.memory, unknown.reason) == (
        Settings(False, 1),
        None,
        "config.json is not here",
    )


def test_what_cannot_fit_is_said_with_the_numbers() -> None:
    chosen = on(4)
    assert chosen.fits is False
    assert chosen.settings == Settings(False, 1)
    assert chosen.micro_batch_tokens == CHART_LIKE.longest
    assert "do not fit 4.0 GiB" in chosen.reason
    assert chosen.memory is not None


@pytest.mark.parametrize(("text", "gigabytes"), [("24GB", 24), ("24", 24), ("79.6 GiB", 79.6), (" 8g ", 8)])
def test_a_cards_memory_is_read_as_it_is_sold(text: str, gigabytes: float) -> None:
    assert parse_gpu_memory(text) == int(gigabytes * GIB)


@pytest.mark.parametrize("text", ["", "GB", "-3", "0", "24TB", "much"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="24GB"):
        parse_gpu_memory(text)


def test_numbers_of_layers_read_as_words() -> None:
    words = {every: recomputation(every) for every in (0, 1, 2, 3, 4, 11, 12, 22)}
    assert words[0] == "none"
    assert words[1] == "all decoder layers"
    assert [words[n].split()[1] for n in (2, 3, 4, 11, 12, 22)] == [
        "2nd",
        "3rd",
        "4th",
        "11th",
        "12th",
        "22nd",
    ]


@pytest.mark.parametrize(
    ("listed", "memory", "capability"),
    [
        ("9.0, 81559, Disabled\n9.0, 81559, Disabled\n", 81559 * 2**20, (9, 0)),
        ("8.9, 24564, [N/A]\n7.5, 15360, [N/A]\n", 15360 * 2**20, (7, 5)),
        ("9.0, 81559, Enabled\n", None, (9, 0)),  # how much a part has, the tool does not say
        ("9.0, [N/A], Disabled\n", None, (9, 0)),
        ("No devices were found\n", None, None),
    ],
)
def test_the_smallest_gpu_that_a_process_sees_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    listed: str,
    memory: int | None,
    capability: tuple[int, int] | None,
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{listed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    hardware._visible_gpus.cache_clear()
    try:
        assert (hardware.gpu_memory(), hardware.compute_capability()) == (memory, capability)
    finally:
        hardware._visible_gpus.cache_clear()


@pytest.mark.parametrize("sharing", [1.0, 0.5, 0.0])
def test_no_micro_batch_computes_more_tokens_than_are_planned(sharing: float) -> None:
    """Of samples whose prefix is computed once, of some that have none, whole ones within the budget."""
    draw = np.random.default_rng(3)
    split = make_split(400, longest=200)
    prefix = np.where(draw.random(400) < sharing, 9, 0)
    split = replace(split, prefix_tokens=prefix)
    batches = batches_of(split, 200, 32, 1, lambda budget: 1)
    for budget in (200, 333, 1000, 5000):
        samples, used = [], 0
        for sample in draw.permutation(400).tolist():
            if used + split.tokens[sample] <= budget:
                samples.append(sample)
                used += int(split.tokens[sample])
        assert work_of_samples(split)[samples].sum() <= work_of_samples(replace(split, prefix_tokens=None))[
            samples
        ].sum() - 26 * int(prefix[samples].sum())
        planned = batches.packed(budget)
        assert split.computed_tokens(samples) <= planned.tokens <= planned.whole_tokens == budget
    assert (batches.packed(5000).tokens < 5000) == (sharing == 1.0)


def test_a_shared_prefix_takes_the_memory_of_attention_alone() -> None:
    load = Load(SHAPE)
    plain, shared, shorter = (
        memory_of(load, Packed(tokens, 700, 6, whole), Settings(False, 0))
        for tokens, whole in ((1000, 1000), (900, 1000), (900, 900))
    )
    assert shorter.training < shared.training < plain.training
    other = replace(load, targets=("o_proj",))
    whole, once = (
        memory_of(other, Packed(900, 700, 6, tokens), Settings(False, 0)).activations for tokens in (900, 901)
    )
    assert (
        once - whole > 28 * 900 * 2 * 3584
    )  # the input of o_proj, which is not the attention's output any more
