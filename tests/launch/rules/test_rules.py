"""Each forbidden combination: refused by its own rule, with the numbers, and no other request is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError
from launch.rules import config_rules, machine_rules, request_rules
from launch.rules.accelerate_config import LaunchConfig, launched_config, launched_strategy
from launch.rules.checks import refuse_config, refuse_topology, violations
from launch.rules.request import PlanRequest, Rule
from launch.strategies import STRATEGIES
from tests.helpers.indexes import HUB_7B, embedded_recipe

ALLOWED = PlanRequest(
    embedded_recipe(),
    strategy="ddp",
    nodes=2,
    gpus_per_node=4,
    samples=330,
    max_steps=30,
    budget=400,
    longest=100,
)


QLORA = embedded_recipe("quantization.load_in_4bit=true")
PLAIN = embedded_recipe("quantization.load_in_4bit=false")
BFLOAT16 = embedded_recipe("quantization.bnb_4bit_compute_dtype=bfloat16")
BFLOAT16_BASE = embedded_recipe(
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_compute_dtype=float32",
    "model.dtype=bfloat16",
)
FLOAT32 = embedded_recipe("quantization.bnb_4bit_compute_dtype=float32", "model.dtype=float32")
RESIDENT = embedded_recipe("model.resident_weights=true")
FP8_IN_FLOAT32 = embedded_recipe(
    "model.products=fp8", "model.dtype=float32", "quantization.load_in_4bit=false"
)
FP8 = embedded_recipe(
    "model.products=fp8", "model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16"
)
FSDP2 = {"fsdp_version": 2}


def _asking(**asked: Any) -> PlanRequest:
    """The allowed request, launched with a configuration of its own."""
    return replace(ALLOWED, config=LaunchConfig("here", **asked))


def test_an_allowed_request_breaks_no_rule() -> None:
    assert list(violations(ALLOWED)) == []


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tests may have one."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("rule", "request_", "numbers"),
    [
        (
            request_rules.strategy_is_available,
            replace(ALLOWED, strategy="zero1"),
            "single, ddp, fsdp, zero2, zero3",
        ),
        (request_rules.topology_is_positive, replace(ALLOWED, nodes=0), "0 nodes, 4 processes"),
        (request_rules.single_is_one_process, replace(ALLOWED, strategy="single"), "8 asked for"),
        (
            request_rules.fsdp_has_gpus,
            replace(ALLOWED, strategy="fsdp", device="cpu"),
            "fsdp needs GPUs (8 CPU processes asked for)",
        ),
        (request_rules.every_process_gets_a_sample, replace(ALLOWED, nodes=9), "32 < 36"),
        (
            request_rules.lora_names_layers_that_are_there,
            replace(ALLOWED, recipe=embedded_recipe("lora.target_modules=[q_proj, qproj]")),
            "'qproj' names no linear layer of decoder or vision tower (1 of 2); did you mean q_proj?",
        ),
        (request_rules.data_fills_one_step, replace(ALLOWED, samples=31, max_steps=0), "31 < 32"),
        (request_rules.run_has_a_step, replace(ALLOWED, max_steps=0), "330 samples"),
        (request_rules.micro_batch_holds_the_longest_sample, replace(ALLOWED, budget=99), "100 tokens > 99"),
        (
            request_rules.warm_up_ends_within_the_run,
            replace(ALLOWED, recipe=embedded_recipe("training.warmup_steps=30")),
            "30 of 30 steps",
        ),
        (
            request_rules.upload_has_a_token,
            replace(ALLOWED, recipe=embedded_recipe("hub.push=true", "hub.repo_id=a/b")),
            "hf auth login",
        ),
        (config_rules.accelerate_casts_nothing, _asking(mixed_precision="bf16"), "bf16 in here"),
        (config_rules.fsdp_is_version_2, _asking(fsdp={"fsdp_version": 1}), "1 in here"),
        (
            config_rules.fsdp_is_version_2,
            _asking(fsdp={"fsdp_offload_params": False}),
            "1 in here",
        ),  # accelerate's own
        (
            config_rules.recomputation_is_ours,
            _asking(fsdp=FSDP2 | {"fsdp_activation_checkpointing": True}),
            "true in here",
        ),
        (
            config_rules.weights_stay_on_the_gpu,
            _asking(fsdp=FSDP2 | {"fsdp_offload_params": "true"}),
            "fsdp_offload_params",
        ),
        (
            config_rules.weights_stay_on_the_gpu,
            _asking(deepspeed={"zero_optimization": {"offload_param": {"device": "cpu"}}}),
            "offload_param",
        ),
        (
            config_rules.weights_stay_on_the_gpu,
            _asking(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}),
            "offload_optimizer",
        ),
        *(
            (
                config_rules.deepspeed_casts_nothing,
                _asking(deepspeed={engine: {"enabled": True}}),
                f"{engine}: enabled",
            )
            for engine in ("bf16", "fp16", "amp")
        ),
        *(
            (config_rules.deepspeed_sections_are_sections, _asking(deepspeed=values), f"{words}: no section")
            for values, words in (
                ({"zero_optimization": None}, "zero_optimization (null)"),
                ({"zero_optimization": 2}, "zero_optimization (2)"),
                ({"bf16": True, "amp": []}, "bf16 (true), amp ([])"),
                ({"zero_optimization": {"offload_param": "cpu"}}, 'zero_optimization.offload_param ("cpu")'),
            )
        ),
        (
            config_rules.deepspeed_counts_what_the_plan_counts,
            _asking(deepspeed={"gradient_accumulation_steps": 4}),
            "gradient_accumulation_steps",
        ),
        (
            config_rules.deepspeed_counts_what_the_plan_counts,
            _asking(deepspeed={"zero_optimization": {"reduce_bucket_size": "auto"}}),
            "reduce_bucket_size",
        ),
        (
            config_rules.deepspeed_is_asked_for_what_is_known,
            _asking(deepspeed={"communication_data_type": "bf16", "scheduler": {}}),
            "communication_data_type, scheduler",
        ),
        (
            config_rules.deepspeed_holds_as_many_layers_as_are_planned,
            _asking(deepspeed={"zero_optimization": {"stage3_max_live_parameters": 500_000_000}}),
            "stage3_max_live_parameters",
        ),
        (
            config_rules.deepspeed_uses_the_standard_launcher,
            _asking(multinode_launcher="pdsh"),
            "pdsh (here)",
        ),
        (
            request_rules.dora_sees_whole_weights,
            replace(ALLOWED, strategy="fsdp", recipe=embedded_recipe("lora.use_dora=true")),
            "use ddp or zero2",
        ),
        (
            request_rules.patterns_name_layers_with_lora,
            replace(ALLOWED, recipe=embedded_recipe('lora.rank_pattern={"qkv": 4}')),
            "lora.rank_pattern: 'qkv' names no layer",
        ),
        (
            request_rules.sharded_weights_stay_packed,
            replace(ALLOWED, strategy="zero3", recipe=RESIDENT),
            "model.resident_weights",
        ),
        (
            machine_rules.fsdp_stores_floats,
            replace(ALLOWED, strategy="fsdp", quant_storage="bfloat16", recipe=QLORA),
            "stored as bfloat16",
        ),
        (
            machine_rules.fsdp_stores_floats,
            replace(ALLOWED, strategy="fsdp", quant_storage="uint8", recipe=QLORA),
            "stored as uint8",
        ),
        (
            machine_rules.versions_are_those_that_were_measured,
            replace(ALLOWED, versions={"accelerate": "1.14.2", "torch": "2.11.0+cu130"}),
            "accelerate 1.14.2 < 1.15",
        ),
        (
            machine_rules.gpu_computes_bfloat16,
            replace(ALLOWED, capability=(7, 5), recipe=BFLOAT16),
            "7.5",
        ),
        (
            machine_rules.gpu_computes_bfloat16,  # what is not in 4 bits
            replace(ALLOWED, capability=(7, 5), recipe=BFLOAT16_BASE),
            "model.dtype: bfloat16 on a GPU of compute capability 7.5",
        ),
        (
            machine_rules.gpu_has_8_bit_products,
            replace(ALLOWED, capability=(8, 6), recipe=FP8),
            "fp8 on a GPU of compute capability 8.6 (8.9 is needed)",
        ),
        (
            machine_rules.gpu_has_8_bit_products,
            replace(ALLOWED, capability=(9, 0), recipe=FP8_IN_FLOAT32),
            "fp8 with model.dtype float32",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_forbidden_request_breaks_its_rule_alone(rule: Rule, request_: PlanRequest, numbers: str) -> None:
    (message,) = violations(request_)
    assert message == rule(request_)
    assert numbers in message
    assert ";" in message


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("zero4", "did you mean zero3?"),
        ("ddpp", "did you mean ddp?"),
        ("FSDP", "did you mean fsdp?"),
        ("pipeline", "see `samestep plan --help`"),
        ("", "see `samestep plan --help`"),
    ],
)
def test_a_strategy_that_is_none_is_answered_with_all_of_them_and_the_nearest(typed: str, hint: str) -> None:
    found = list(violations(replace(ALLOWED, strategy=typed)))
    assert found == [f"--strategy: {typed!r} is none of single, ddp, fsdp, zero2, zero3, auto; {hint}"]


def test_zero_needs_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rules, "find_spec", lambda _: None)
    (message,) = violations(replace(ALLOWED, strategy="zero3"))
    assert message.startswith("--strategy: zero3 needs DeepSpeed, which is not installed; ")
    assert list(violations(ALLOWED)) == []
    assert list(violations(replace(ALLOWED, strategy="zero3", packages_here=False))) == []


@pytest.mark.parametrize(
    "override",
    [
        "training.optim=adamw_8bit",
        "training.optim=paged_adamw_32bit",
        "training.gradient_checkpointing_kwargs={use_reentrant: true}",
        "quantization.bnb_4bit_quant_storage=bfloat16",
        "batch.world_size=8",
    ],
)
def test_a_recipe_cannot_say_what_is_the_plans(override: str) -> None:
    assert any(override.startswith(key) for key, _ in request_rules.SCHEMA_RULES)
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        embedded_recipe(override)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qwen3_vl_moe", "a mixture of experts is not trained here"),
        ("llava", "not one of qwen2_vl, qwen2_5_vl,"),
    ],
)
def test_a_base_of_no_known_family_is_refused_by_its_kind(tmp_path: Path, kind: str, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    recipe = embedded_recipe(f"model.name_or_path={tmp_path}")
    told = request_rules.base_is_of_a_known_family(replace(ALLOWED, recipe=recipe))
    assert told is not None
    assert words in told
    assert f"is a {kind}" in told


def test_lora_in_the_vision_tower_is_refused_with_zero3_and_with_a_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB_7B))
    base = f"model.name_or_path={tmp_path}"
    for names, targets in (("qkv", 1), ("visual.merger.mlp.0", 1), ("fc1,mlp.2", 2)):
        lora = f"lora.target_modules=[q_proj,{names}]"
        sharded = replace(ALLOWED, strategy="zero3", recipe=embedded_recipe(base, lora))
        assert f"({targets} kinds of layers" in str(request_rules.trained_tower_is_whole(sharded))
        assert request_rules.trained_tower_is_whole(replace(sharded, strategy="zero2")) is None
        cached = replace(ALLOWED, recipe=embedded_recipe(base, lora, "data.vision_cache=disk"))
        assert "set it to off" in str(request_rules.trained_tower_is_not_cached(cached))
        assert request_rules.lora_names_layers_that_are_there(cached) is None
    for idle in ("blocks.32.attn.qkv", "patch_embed.proj", "linear_fc1"):
        wrong = embedded_recipe(base, f"lora.target_modules=[q_proj,{idle}]")
        assert repr(idle) in str(
            request_rules.lora_names_layers_that_are_there(replace(ALLOWED, recipe=wrong))
        )


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    both = replace(ALLOWED, recipe=embedded_recipe("tracking.report_to=[tensorboard, wandb]"))
    assert request_rules.trackers_are_installed(both) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find_spec(name))
    refused = request_rules.trackers_are_installed(both)
    assert refused is not None
    assert "wandb is not installed (1 of 2 trackers); pip install 'samestep[wandb]'" in refused
    assert request_rules.trackers_are_installed(replace(both, packages_here=False)) is None


def test_a_metric_of_ones_own_is_looked_at_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text("raise SystemExit\ndef close(prediction, labels):\n    return 1\n")
    (tmp_path / "broken.py").write_text("def close(:\n")
    (tmp_path / "text.py").write_bytes(b"\xff")

    def said(*names: str) -> str | None:
        metrics = ", ".join(f"{tmp_path}/{name}" for name in names)
        recipe = embedded_recipe(f"evaluation.metrics=[exact_match, {metrics}]")
        return request_rules.metrics_of_ones_own_are_there(replace(ALLOWED, recipe=recipe))

    assert said("scores.py:close") is None
    for name, words in (
        (
            "gone:close",
            f"{tmp_path}/gone:close: there is no file {tmp_path}/gone.py; put it beside the recipe",
        ),
        (
            "scores.py:far",
            "scores.py has no function far; define far(prediction: str, labels: list[str]) -> float",
        ),
        ("broken.py:close", "broken.py is no Python (line 1: "),
        ("text.py:close", "text.py cannot be read (is no UTF-8 text"),
    ):
        assert words in str(said(name))
    with pytest.raises(ConfigError, match="'scores:close' is named 2 times"):
        said("scores.py:close", "scores:close")


def test_every_rule_has_a_case_above() -> None:
    every = (
        request_rules.REQUEST_RULES
        + config_rules.CONFIG_RULES
        + machine_rules.MACHINE_RULES
        + request_rules.DATA_RULES
    )
    assert len(every) == 34


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_shipped_configurations_break_no_rule(strategy: str) -> None:
    nodes, gpus = (1, 1) if STRATEGIES[strategy].is_one_process else (2, 4)
    assert list(violations(replace(ALLOWED, strategy=strategy, nodes=nodes, gpus_per_node=gpus))) == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing: true",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "True"},
            "fsdp_offload_params",
        ),
    ],
)
def test_another_configuration_than_the_shipped_one_is_refused_where_it_was_launched(
    environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_config(embedded_recipe(), "fsdp", 1, launched_config(environment))
    (problem,) = caught.value.problems
    assert problem.startswith(words)
    assert "the accelerate config of this launch" in problem


def test_a_launched_deepspeed_file_is_read_and_its_engines_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    with pytest.raises(ConfigError, match=r"zero\.json: cannot be read"):
        launched_config(environment)
    file.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}}')
    config = launched_config(environment)
    assert launched_strategy(config, several=True) == "zero3"
    with pytest.raises(ConfigError, match="bf16: enabled in the DeepSpeed file"):
        refuse_config(embedded_recipe(), "zero3", 1, config)
    with pytest.raises(ConfigError, match="deepspeed_config_file: the accelerate config names none"):
        launched_config({"ACCELERATE_USE_DEEPSPEED": "true"})


def test_the_strategy_of_a_plain_launch_is_that_of_its_configuration() -> None:
    plain = launched_config({})
    assert [launched_strategy(plain, several) for several in (False, True)] == ["single", "ddp"]
    fsdp = launched_config({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert launched_strategy(fsdp, several=True) == "fsdp"
    left_over = {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}  # of a shell, not of this launch
    assert launched_config(left_over) == plain


def test_a_deepspeed_file_that_shards_nothing_is_no_strategy(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    for text in ("{}", '{"zero_optimization": null}', '{"zero_optimization": {"stage": 0}}'):
        file.write_text(text)
        strategy = launched_strategy(launched_config(environment), several=True)
        (message,) = violations(replace(ALLOWED, strategy=strategy))
        assert message.startswith("--strategy: 'zero0' is none of single, ddp,")
    for text in ("[]", "{"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"zero\.json: .*; correct it, or restore the shipped file"):
            launched_config(environment)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("deepspeed_config: 2", "deepspeed_config is no section (2)"),
        ("fsdp_config: [a]", "fsdp_config is no section (['a'])"),
        ("[" * 3000, "cannot be read"),
        ("deepspeed_config: {deepspeed_config_file: 5}", "ds_configs/5: no such file"),
    ],
)
def test_a_shipped_configuration_that_was_damaged_is_refused_in_one_line(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.resources.resource_folder", lambda kind: tmp_path)
    (tmp_path / "zero2.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        list(violations(replace(ALLOWED, strategy="zero2")))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "edge",
    [
        replace(ALLOWED, nodes=8),  # a process for each sample
        replace(ALLOWED, samples=32, max_steps=1),
        replace(ALLOWED, budget=100),
        replace(ALLOWED, strategy="single", nodes=1, gpus_per_node=1),
        replace(ALLOWED, strategy="ddp", nodes=1, gpus_per_node=1),
        replace(ALLOWED, recipe=embedded_recipe("training.warmup_steps=29")),
        _asking(fsdp={"fsdp_version": "2", "fsdp_offload_params": "false"}),
        _asking(deepspeed={"zero_optimization": {"offload_param": {"device": "none"}}, "bf16": None}),
        _asking(deepspeed={"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": 1}}),
        replace(_asking(multinode_launcher="pdsh"), nodes=1),
        replace(ALLOWED, strategy="fsdp", quant_storage="uint8", recipe=PLAIN),  # nothing is packed
        replace(ALLOWED, strategy="fsdp", quant_storage="float32", recipe=QLORA),
        replace(ALLOWED, strategy="zero2", quant_storage="uint8", recipe=QLORA),
        replace(ALLOWED, versions=dict(machine_rules.FLOORS)),
        replace(
            ALLOWED, versions={"accelerate": "1.14.2"}, packages_here=False
        ),  # the job's own are judged there
        replace(ALLOWED, strategy="fsdp", device="cuda"),
        replace(ALLOWED, strategy="zero3", device="cpu"),
        replace(ALLOWED, capability=(8, 0), recipe=BFLOAT16),
        replace(ALLOWED, capability=(7, 5), recipe=FLOAT32),
    ],
)
def test_the_last_allowed_request_before_each_limit_is_allowed(edge: PlanRequest) -> None:
    assert list(violations(edge)) == []


def test_a_topology_is_refused_before_the_data_is_known() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_topology(embedded_recipe(), "zero1", 1, 64)
    assert len(caught.value.problems) == 2
    refuse_topology(embedded_recipe(), "ddp", 1, 2)
