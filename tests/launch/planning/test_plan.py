"""Every derived number of a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launch.errors import ConfigError
from launch.planning.load_balance import micro_batches_needed
from launch.planning.make_plan import make_plan, warmup_steps_of
from launch.planning.oom_fallback import memory_rows, plan_on, plan_with_less
from launch.planning.plan import Plan, RunHistory, samples_consumed
from launch.planning.plan_table import plan_rows
from launch.planning.run_steps import step_plan
from launch.planning.step_plan import SampleStream, StreamOffset
from launch.planning.topology import Topology
from launch.recipe.schema import Recipe
from launch.units import GIB
from tests.helpers.indexes import SHAPE, embedded_recipe, make_index

CHARTS = make_index(330, longest=1200)


def plan_for(
    recipe: Recipe, strategy: str = "ddp", nodes: int = 1, gpus_per_node: int = 2, train: int = 330
) -> Plan:
    return make_plan(recipe, make_index(train), Topology(strategy, nodes, gpus_per_node, "cpu"))


def test_the_numbers_of_a_small_run() -> None:
    plan = plan_for(embedded_recipe("batch.micro_batch_tokens=auto"), nodes=2, gpus_per_node=2)
    assert (plan.world_size, plan.global_batch_size) == (4, 32)
    assert plan.max_steps == 30  # 990 samples of 3 epochs hold 30 whole steps of 32
    assert plan.samples_left == 30
    assert plan.warmup_steps == 1  # 0.9 rounded up
    assert plan.steps_per_epoch == 330 / 32
    assert plan.longest_sample_tokens == 90
    assert plan.micro_batch_tokens == 360  # auto: four of the longest


def test_the_notebook_takes_265_whole_steps() -> None:
    plan = plan_for(embedded_recipe(), train=2830)
    assert (plan.max_steps, plan.samples_left) == (265, 10)


def test_max_steps_wins_over_epochs() -> None:
    plan = plan_for(embedded_recipe("training.max_steps=7", "training.num_train_epochs=100"))
    assert (plan.max_steps, plan.samples_left) == (7, 0)


@pytest.mark.parametrize("key", ["max_steps=1000001", "num_train_epochs=1e308", "num_train_epochs=1000000"])
def test_more_steps_than_can_be_planned_are_refused_at_once(key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"training.{key.partition('=')[0]}: makes more than 1,000,000 steps"
    ):
        plan_for(embedded_recipe(f"training.{key}"))


@pytest.mark.parametrize("max_steps", [1, 7, 30, 265])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1, 5])
def test_the_warm_up_is_what_transformers_makes_of_it(max_steps: int, warmup: float) -> None:
    from trl import SFTConfig

    recipe = embedded_recipe(f"training.warmup_steps={warmup}")
    arguments = SFTConfig(output_dir="unused", warmup_steps=warmup, use_cpu=True, bf16=False)
    assert warmup_steps_of(recipe, max_steps) == arguments.get_warmup_steps(max_steps)


def test_what_is_trained_does_not_depend_on_the_topology() -> None:
    plans = [plan_for(embedded_recipe(), gpus_per_node=world_size) for world_size in (1, 2, 3, 32)]
    hardware = {"nodes", "gpus_per_node", "world_size", "micro_batches", "strategy"}
    facts = [{k: v for k, v in json.loads(plan.to_json()).items() if k not in hardware} for plan in plans]
    assert all(fact == facts[0] for fact in facts)


def test_every_step_of_the_step_plan_keeps_the_plan() -> None:
    recipe, index = embedded_recipe(), make_index()
    plan = make_plan(recipe, index, Topology("ddp", 1, 3, "cpu"))
    steps = step_plan(recipe, index, plan)
    tokens = index.splits["train"].tokens
    for step in range(plan.max_steps):
        dealt: list[int] = []
        for rank in range(3):
            micro_batches = steps.micro_batches_of(step, rank)
            assert len(micro_batches) == plan.micro_batches
            for micro_batch in micro_batches:
                assert tokens[list(micro_batch.samples)].sum() <= plan.micro_batch_tokens
                dealt += [] if micro_batch.filler else micro_batch.samples
        assert sorted(dealt) == sorted(steps.samples(step).tolist())


def test_all_broken_rules_come_in_one_error() -> None:
    recipe = embedded_recipe("batch.micro_batch_tokens=50", "batch.global_batch_size=8")
    with pytest.raises(ConfigError) as caught:
        make_plan(recipe, make_index(7), Topology("single", 1, 9, "cpu"))
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert keys == ["--strategy", "batch.global_batch_size", "data.train", "batch.micro_batch_tokens"]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.train: fewer samples"):
        plan_for(embedded_recipe(), train=0)


def test_the_budget_covers_the_longest_sample_of_validation_too() -> None:
    index = make_index()
    longer = replace(index.splits["validation"], text_tokens=np.full(20, 500))
    index = replace(index, splits={**index.splits, "validation": longer})
    plan = make_plan(embedded_recipe(), index, Topology("single", 1, 1, "cpu"))
    assert plan.longest_sample_tokens > 500


def test_a_plan_survives_being_written_and_its_digest_shows_any_change() -> None:
    plan = plan_for(embedded_recipe())
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()
    assert replace(plan, micro_batches=plan.micro_batches + 1).digest() != plan.digest()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "x"}', "null", "[" * 100_000, "\0"])
def test_a_damaged_plan_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.json: not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("begin", None),
        ("begin", {"step": "3", "sample": 0}),
        ("begin", {"step": 3, "sample": 96, "epoch": 1}),
        ("allowed", None),
        ("allowed", "training.seed"),
        ("allowed", [1]),
        ("started_from", 7),
        ("global_batch_size", "32"),
        ("global_batch_size", 32.5),
        ("of_another_version", 1),
    ],
)
def test_a_plan_with_a_value_of_another_kind_is_refused_by_its_name(key: str, value: object) -> None:
    values = {**json.loads(plan_for(embedded_recipe()).to_json()), key: value}
    with pytest.raises(ConfigError, match=rf"plan\.json: not a plan of this version \({key}"):
        Plan.from_json(json.dumps(values))


def test_a_plan_from_before_runs_could_go_on_otherwise_begins_at_the_beginning() -> None:
    plan = plan_for(embedded_recipe())
    values = json.loads(plan.to_json())
    for key in ("begin", "allowed", "started_from"):
        del values[key]
    assert Plan.from_json(json.dumps(values)) == plan


def test_a_plan_that_goes_on_otherwise_survives_being_written() -> None:
    plan = replace(
        plan_for(embedded_recipe()), begin=StreamOffset(3, 96), allowed=["data.content"], started_from="/a/b"
    )
    assert Plan.from_json(plan.to_json()) == plan
    rows = dict(plan_rows(plan))
    assert (rows["starts from"], rows["allowed to differ"]) == ("/a/b", "data.content")
    assert not {"starts from", "allowed to differ"} & dict(plan_rows(plan_for(embedded_recipe()))).keys()


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    taken=st.integers(0, 20),
    epochs=st.integers(1, 3),
    world_size=st.integers(1, 4),
)
def test_the_plan_after_a_change_of_the_batch_size_trains_exactly_the_rest_of_the_epochs(
    sizes: tuple[int, int], taken: int, epochs: int, world_size: int
) -> None:
    index, samples = make_index(50), 50 * epochs
    taken = min(taken, (samples - sizes[1]) // sizes[0])  # at least a step is left
    assume(taken >= 0 and world_size <= sizes[1])
    recipe = embedded_recipe(
        f"batch.global_batch_size={sizes[1]}",
        f"training.num_train_epochs={epochs}",
        "training.warmup_steps=0",
    )
    begin = StreamOffset(taken, taken * sizes[0])
    plan = make_plan(recipe, index, Topology("ddp", 1, world_size, "cpu"), history=RunHistory(begin=begin))
    steps = step_plan(recipe, index, plan)
    assert samples_consumed(plan, taken) == begin.sample
    assert samples_consumed(plan, plan.max_steps) + plan.samples_left == samples
    assert 0 <= plan.samples_left < sizes[1]
    seen = [sample for step in range(taken, plan.max_steps) for sample in steps.samples(step).tolist()]
    straight = SampleStream(
        n=50, global_batch_size=samples, seed=recipe.training.seed, fingerprint=index.fingerprint
    ).samples(0)
    assert seen == straight[begin.sample : samples - plan.samples_left].tolist()
    needed = [
        micro_batches_needed(steps.tokens[steps.samples(step)].tolist(), world_size, plan.micro_batch_tokens)
        for step in range(taken, plan.max_steps)
    ]
    assert plan.micro_batches == max(needed)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["quantization.bnb_4bit_compute_dtype=bfloat16"], "bfloat16"),
        (["quantization.bnb_4bit_compute_dtype=float32"], "float32"),
        (["quantization.load_in_4bit=false", "model.dtype=bfloat16"], "bfloat16"),
        (["quantization.load_in_4bit=false", "model.dtype=float32"], "float32"),
    ],
)
def test_precision_follows_the_quantized_base_or_the_model(overrides: list[str], dtype: str) -> None:
    assert plan_for(embedded_recipe(*overrides)).compute_dtype == dtype


def test_a_plan_of_an_unknown_strategy_is_refused_with_those_there_are() -> None:
    text = replace(plan_for(embedded_recipe()), strategy="zero9").to_json()
    with pytest.raises(ConfigError, match=r"strategy: 'zero9' is none of single, ddp, fsdp, zero2, zero3"):
        Plan.from_json(text)


def test_a_plan_that_an_older_version_wrote_is_read() -> None:
    plan = plan_for(embedded_recipe())
    older = json.loads(plan.to_json()) | {"autocast": True}
    for added_since in ("begin", "allowed", "started_from", "identity", "samples_digest"):
        del older[added_since]
    assert Plan.from_json(json.dumps(older)) == replace(plan, samples_digest="positions")


def test_a_plan_is_written_flat_with_the_keys_of_older_versions() -> None:
    plan = plan_for(embedded_recipe()).with_settings(tried=True, out_of_memory=2)
    written = json.loads(plan.to_json())
    assert not any(isinstance(value, dict) for key, value in written.items() if key not in _MAPPINGS)
    assert (written["settings_tried"], written["out_of_memory"]) == (True, 2)
    assert written["settings_reason"] == plan.settings.reason
    assert (written["resident_weights"], written["recompute_every"]) == (
        plan.settings.keep_dequantized,
        plan.settings.activation_checkpoint_every,
    )


_MAPPINGS = ("versions", "begin", "identity")


def test_the_table_says_what_is_left_of_the_stream() -> None:
    rows = dict(plan_rows(plan_for(embedded_recipe())))
    assert rows["left of the stream"] == "30 samples left after the last whole step"
    assert rows["steps"] == "30 (2.91 epochs), 1 of them warm-up"


AUTO = (
    "model.dtype=bfloat16",
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_compute_dtype=bfloat16",
    "training.gradient_checkpointing=auto",
    "batch.micro_batch_tokens=auto",
    "lora.target_modules=[q_proj, v_proj]",
)


def seven_b(monkeypatch: pytest.MonkeyPatch, gigabytes: float | None, *overrides: str) -> Plan:
    """A plan for the 7B shape and chart-sized samples on one GPU."""
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: SHAPE)
    return make_plan(
        embedded_recipe(*AUTO, *overrides),
        CHARTS,
        Topology("single", 1, 1, "cuda", None if gigabytes is None else int(gigabytes * GIB)),
    )


def test_settings_of_a_plan_follow_the_gpu_and_alter_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small, unknown = (seven_b(monkeypatch, gigabytes) for gigabytes in (79.6, 10, None))
    assert (large.settings.keep_dequantized, large.settings.activation_checkpoint_every) == (True, 0)
    assert (small.settings.keep_dequantized, small.settings.activation_checkpoint_every) == (False, 1)
    assert (
        unknown.settings.keep_dequantized,
        unknown.settings.activation_checkpoint_every,
        unknown.gpu_memory,
    ) == (False, 1, 0)
    assert large.micro_batches < small.micro_batches
    assert small.settings.planned_memory < 10 * GIB < large.settings.planned_memory < 79.6 * GIB
    assert large.recipe_fingerprint == small.recipe_fingerprint == unknown.recipe_fingerprint
    rows = dict(plan_rows(large))
    assert rows["recomputed"] == "none"
    assert "the fastest that fits 79.6 GiB" in rows["memory a GPU"]
    assert "held dequantized" in rows["precision"]
    assert "--gpu-memory" in dict(plan_rows(unknown))["memory a GPU"]


def test_a_plan_comes_down_until_nothing_smaller_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = seven_b(monkeypatch, 79.6).with_settings(tried=True)
    recipe, peaks = embedded_recipe(*AUTO), [plan.settings.planned_memory]
    while smaller := plan_with_less(recipe, CHARTS, plan, reloading=True):
        assert not smaller.settings.tried
        assert smaller.gpu_memory == plan.gpu_memory
        plan = smaller
        peaks.append(plan.settings.planned_memory)
    assert peaks == sorted(set(peaks), reverse=True)
    assert (plan.settings.keep_dequantized, plan.settings.activation_checkpoint_every) == (False, 1)
    assert plan.micro_batch_tokens < 1.2 * plan.longest_sample_tokens
    assert len(peaks) < 40


def test_weights_that_are_held_dequantized_stay_so_until_they_are_loaded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = seven_b(monkeypatch, 79.6)
    while smaller := plan_with_less(embedded_recipe(*AUTO), CHARTS, plan, reloading=False):
        plan = smaller
    assert plan.settings.keep_dequantized
    assert plan_with_less(embedded_recipe(*AUTO), CHARTS, plan, reloading=True) is not None


def test_layers_that_stay_whole_are_let_go_first_when_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: SHAPE)
    recipe = embedded_recipe(*AUTO)
    plan = make_plan(recipe, CHARTS, Topology("fsdp", 1, 2, "cuda", 80 * GIB))
    assert plan.settings.whole_layers == SHAPE.layers
    assert dict(plan_rows(plan))["gathered"].startswith(f"{SHAPE.layers} decoder layers once")
    smaller = plan_with_less(recipe, CHARTS, plan, reloading=False)
    assert smaller is not None
    assert smaller.settings.planned_memory < plan.settings.planned_memory
    assert (smaller.settings.whole_layers, smaller.settings.tried) == (0, False)
    assert smaller.micro_batch_tokens == plan.micro_batch_tokens
    less = plan_with_less(recipe, CHARTS, smaller, reloading=False)
    assert less is not None
    assert less.settings.planned_memory < smaller.settings.planned_memory


def test_a_zero3_plan_of_an_older_version_is_read_with_what_its_layers_are_stored_in_now() -> None:
    plan = plan_for(embedded_recipe(), strategy="zero3")
    older = json.loads(plan.to_json()) | {"quant_storage": "uint8"}
    del older["whole_layers"]
    assert Plan.from_json(json.dumps(older)) == plan
    assert plan.quant_storage == "float16"


def test_what_the_recipe_fixes_does_not_come_down(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = (
        "training.gradient_checkpointing=false",
        "batch.micro_batch_tokens=9000",
        "model.resident_weights=true",
    )
    plan = seven_b(monkeypatch, 79.6, *fixed)
    assert plan_with_less(embedded_recipe(*AUTO, *fixed), CHARTS, plan, reloading=True) is None


def test_a_plan_made_without_the_gpu_is_completed_where_the_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown = seven_b(monkeypatch, 79.6), seven_b(monkeypatch, None)
    assert plan_on(embedded_recipe(*AUTO), CHARTS, unknown, int(79.6 * GIB)) == known


def test_each_strategy_is_shown_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: SHAPE)
    rows = memory_rows(embedded_recipe(*AUTO), CHARTS, Topology("ddp", 1, 8, "cuda", 6 * GIB))
    fits = {row[0]: row[4] for row in rows}
    assert [*fits] == ["ddp", "fsdp", "zero2", "zero3"]
    assert fits["fsdp"] == "yes"
    assert fits["ddp"].startswith("no, needs ")
    assert [row[0] for row in rows if row[5] == "recommended"] == ["fsdp"]
    assert [
        row[0] for row in memory_rows(embedded_recipe(*AUTO), CHARTS, Topology("single", 1, 1, "cuda"))
    ] == ["single"]
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: "config.json is not here")
    assert memory_rows(embedded_recipe(*AUTO), CHARTS, Topology("ddp", 1, 8, "cuda", 6 * GIB)) == []
