"""The recipe: strict, all errors at once, and the same run for equal values."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from transformers import get_scheduler

from launch.errors import ConfigError
from launch.recipe.fingerprint import altering_values, recipe_fingerprint
from launch.recipe.loading import dump_recipe, find_recipe, load_recipe, recipe_from_dict
from launch.recipe.refused_fields import REFUSED_LORA_FIELDS, REFUSED_TRAINING_FIELDS
from launch.recipe.schedules import ARGUMENTS, wrong_schedule
from launch.recipe.schema import LoraSection, Recipe, TrainingSection, recipe_schema
from launch.resources import resource, resource_names
from launch.run.changes import changes

EMBEDDED = resource("recipes", "embedded.yaml")


def problems_of(*overrides: str, path: Path = EMBEDDED) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


@pytest.mark.parametrize("name", [name for name in resource_names("recipes") if name.endswith(".yaml")])
def test_a_shipped_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(resource("recipes", name))
    copy = tmp_path / "recipe.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_the_default_recipe_keeps_the_values_of_the_notebook() -> None:
    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"))
    assert recipe.model.name_or_path == "Qwen/Qwen2-VL-7B-Instruct"
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (8, 16, 0.05)
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.quantization.bnb_4bit_use_double_quant
    assert recipe.batch.global_batch_size == 32
    training = recipe.training
    assert (training.learning_rate, training.warmup_steps, training.max_grad_norm) == (2e-4, 0.03, 0.3)
    assert (recipe.checkpoint.every_steps, recipe.evaluation.every_steps, training.logging_steps) == (
        20,
        10,
        10,
    )
    assert recipe.data.system_message.startswith(
        "You are a Vision Language Model specialized in interpreting"
    )
    assert recipe.data.system_message.endswith("Avoid additional explanation unless absolutely necessary.")
    assert recipe.data.system_message.count("\n") == 3
    assert recipe.data.loss == "answer"


def test_the_notebook_recipe_differs_from_the_default_in_share_and_loss_alone() -> None:
    default = altering_values(load_recipe(find_recipe("qwen2vl_7b_chartqa")))
    notebook = altering_values(load_recipe(find_recipe("notebook")))
    differing = {key: value for key, value in notebook.items() if default[key] != value}
    assert differing == {
        "data.train": "train[:10%]",
        "data.validation": "val[:10%]",
        "data.test": "test[:10%]",
        "data.loss": "sequence",
    }


def test_the_larger_and_smaller_recipes_differ_from_the_default_in_the_model_alone() -> None:
    default = altering_values(load_recipe(find_recipe("qwen2vl_7b_chartqa")))
    for size in ("2b", "72b"):
        other = altering_values(load_recipe(find_recipe(f"qwen2vl_{size}_chartqa")))
        assert {key for key in default if default[key] != other[key]} == {"model.name_or_path"}


def test_products_of_8_bits_alter_a_run_and_their_absence_is_what_older_runs_recorded() -> None:
    name = "qwen2vl_7b_chartqa"
    plain = altering_values(load_recipe(find_recipe(name)))
    in_8_bits = altering_values(load_recipe(find_recipe(name), ["model.products=fp8"]))
    assert "model.products" not in plain
    first = "model.num_layers_at_start_in_bf16"
    assert in_8_bits == plain | {"model.products": "fp8", first: "auto"}
    older = altering_values(load_recipe(find_recipe(name), ["model.products=fp8", f"{first}=0"]))
    assert older == plain | {"model.products": "fp8"}
    assert [str(change) for change in changes(older, in_8_bits)] == [
        f"{first}: the run has 0, the recipe 'auto'"
    ]


def test_what_a_run_s_own_copy_lacks_means_what_the_version_that_wrote_it_did(tmp_path: Path) -> None:
    text = dump_recipe(load_recipe(EMBEDDED)).replace("  num_layers_at_start_in_bf16: auto\n", "")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").model.num_layers_at_start_in_bf16 == "auto"
    (tmp_path / "plan.json").touch()
    assert load_recipe(tmp_path / "recipe.yaml").model.num_layers_at_start_in_bf16 == 0


def test_every_sft_field_is_either_accepted_or_refused_with_a_reason() -> None:
    from trl import SFTConfig

    installed = {field.name for field in dataclasses.fields(SFTConfig)}
    accepted, refused = set(TrainingSection.model_fields), set(REFUSED_TRAINING_FIELDS)
    assert accepted & refused == set()
    assert accepted | refused == installed | {"deterministic", "recheck"}


def test_every_lora_field_is_either_accepted_or_refused_with_a_reason() -> None:
    from peft import LoraConfig

    installed = {field.name for field in dataclasses.fields(LoraConfig)}
    accepted = set(LoraSection.model_fields)
    refused = {key.removeprefix("lora.") for key in REFUSED_LORA_FIELDS}
    assert accepted & refused == set()
    assert accepted | refused == installed


def test_lora_fields_that_older_versions_lacked_leave_their_recipes_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"))
    newer = {"use_dora", "use_rslora", "rank_pattern", "alpha_pattern"}
    assert not {f"lora.{key}" for key in newer} & set(altering_values(recipe))
    changed = load_recipe(find_recipe("qwen2vl_7b_chartqa"), ["lora.use_dora=true"])
    assert recipe_fingerprint(changed) != recipe_fingerprint(recipe)
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: refused; a module trained whole"):
        load_recipe(find_recipe("qwen2vl_7b_chartqa"), ["lora.modules_to_save=[lm_head]"])
    with pytest.raises(ConfigError, match=r"lora\.rank_pattern"):
        load_recipe(find_recipe("qwen2vl_7b_chartqa"), ['lora.rank_pattern={"(q|v)_proj": 4}'])


def test_every_scheduler_is_one_that_transformers_has() -> None:
    from transformers import SchedulerType

    offered = set(get_args(TrainingSection.model_fields["lr_scheduler_type"].annotation))
    assert offered <= {scheduler.value for scheduler in SchedulerType}


def test_a_refused_sft_field_is_named_with_its_reason() -> None:
    (problem,) = problems_of("training.gradient_accumulation_steps=8")
    assert problem.startswith("training.gradient_accumulation_steps: refused; the plan derives it")
    assert "batch.global_batch_size" in problem


def test_all_problems_of_a_recipe_come_at_once() -> None:
    problems = problems_of(
        "training.lerning_rate=1",
        "training.bf16=true",
        "lora.r=x",
        "lora.target_modules=[]",
        "data.loss=everything",
        "batch.global_batch_size=0",
        "batch.micro_batch_tokens=many",
        "training.seed=true",
        "training.max_steps=1.5",
        "no value",
        "name.inside=1",
    )
    keys = {problem.partition(":")[0] for problem in problems}
    assert keys == {
        "training.lerning_rate",
        "training.bf16",
        "lora.r",
        "lora.target_modules",
        "data.loss",
        "batch.global_batch_size",
        "batch.micro_batch_tokens",
        "training.seed",
        "training.max_steps",
        "--set no value",
        "--set name.inside=1",
    }
    assert len(problems) == len(keys)
    assert all(";" in problem for problem in problems)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("training.lerning_rate=1", "training.learning_rate"),
        ("lerning_rate=1", "training.learning_rate"),
        ("lora.alpha=1", "lora.lora_alpha"),
        ("modle.dtype=float32", "model"),
        ("data.sytem_message=x", "data.system_message"),
        ("lora.dropout=0", "lora.lora_dropout"),
        ("lora.modules=[q_proj]", "lora.target_modules"),
        ("evaluation.eval_steps=5", "evaluation.every_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(wrong: str, nearest: str) -> None:
    (problem,) = problems_of(wrong)
    assert problem.endswith(f"unknown key; did you mean {nearest}?")


@pytest.mark.parametrize(("text", "value"), [("2e-4", 2e-4), ("1E-3", 1e-3), ("0.5", 0.5), ("1", 1.0)])
def test_a_number_yaml_reads_as_text_is_understood(text: str, value: float) -> None:
    assert load_recipe(EMBEDDED, [f"training.learning_rate={text}"]).training.learning_rate == value


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf", "-1", "0", "fast", "true", "null", "[1]"])
def test_a_learning_rate_that_is_none_is_refused(value: str) -> None:
    (problem,) = problems_of(f"training.learning_rate={value}")
    assert problem.startswith("training.learning_rate: ")


@pytest.mark.parametrize(
    "split", ["train", "train[:10%]", "train[:200]", "train[:100%]", "train[90%:]", "train[10:20]"]
)
def test_a_split_may_be_shortened(split: str) -> None:
    assert load_recipe(EMBEDDED, [f"data.train={split}"]).data.train == split


@pytest.mark.parametrize(
    "split",
    [
        "train[:0]",
        "train[:101%]",
        "train[10:5]",
        "train[90%:90%]",
        "../x",
        "train[:10%",
        "''",
        "'train, 5 %'",
    ],
)
def test_a_split_that_is_none_is_refused(split: str) -> None:
    (problem,) = problems_of(f"data.train={split}")
    assert problem.startswith("data.train: ")


def test_validation_and_test_may_be_drawn_out_of_training_or_missing() -> None:
    for split in ("'train, 5 %'", "'train, 0.5%'", "null", "train[95%:]"):
        assert load_recipe(EMBEDDED, [f"data.validation={split}", "data.test=null"]).data.test is None
    for split in ("'train, 0 %'", "'train, 100 %'", "'train, x'"):
        (problem,) = problems_of(f"data.validation={split}")
        assert problem.startswith("data.validation: ")
    (problem,) = problems_of("data.validation='train, 5 %'", "data.test='train, 5 %'")
    assert problem.startswith("data.test: draws the same rows as data.validation")
    (problem,) = problems_of("data.validation=null", "evaluation.answers=8")
    assert problem.startswith("evaluation.answers: there is no validation split")
    (problem,) = problems_of("data.format=messages", "data.columns={query: q}")
    assert problem.startswith("data.columns: is for data.format: columns")
    (problem,) = problems_of("data.columns={query: q, label: q}")
    assert problem.startswith("data.columns: 'q' is named for two of image, query and label")


def test_keys_that_older_recipes_do_not_have_alter_no_fingerprint() -> None:
    recipe = load_recipe(EMBEDDED)
    later = ("data.format", "data.columns", "data.chat_template")
    assert not [key for key in altering_values(recipe) if key in later]
    other = load_recipe(EMBEDDED, ["data.columns={query: question}"])
    assert recipe_fingerprint(other) != recipe_fingerprint(recipe)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["training.warmup_steps=1.5"], "training.warmup_steps"),
        (["training.lr_scheduler_type=constant", "training.warmup_steps=0.1"], "training.warmup_steps"),
        (["training.max_steps=0"], "training.max_steps"),
        (["hub.push=true"], "hub.repo_id"),
        (["data.min_pixels=2000", "data.max_pixels=1000"], "data.min_pixels"),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides: list[str], key: str) -> None:
    (problem,) = problems_of(*overrides)
    assert problem.startswith(f"{key}: ")


def test_a_relative_folder_that_is_not_there_is_named_with_the_place_that_was_tried() -> None:
    (problem,) = problems_of("data.dataset=charts/of/mine")
    place = f"{Path.cwd()}/charts/of/mine, relative to the current folder"
    assert problem.startswith(
        f"data.dataset: 'charts/of/mine' is not a folder here ({place}) and not a hub id"
    )


@pytest.mark.parametrize(
    ("schedule", "given", "words"),
    [
        ("linear", "{num_cycles: 3}", "kwargs.num_cycles: linear has no such argument; it takes none"),
        ("constant_with_warmup", "{num_cycles: 3}", "kwargs.num_cycles: constant_with_warmup has no such"),
        ("cosine_with_restarts", "{num_cycles: abc}", "'abc' is not a whole number of at least 1"),
        ("inverse_sqrt", "{timescale: 0}", "0 is not a whole number of at least 1"),
        ("cosine_with_min_lr", "null", "cosine_with_min_lr needs either min_lr (a rate) or min_lr_rate"),
        ("cosine_with_min_lr", "{min_lr: 0.0, min_lr_rate: 0.1}", "needs either min_lr"),
        ("warmup_stable_decay", "{decay_type: cosine}", "needs num_decay_steps"),
        (
            "warmup_stable_decay",
            "{num_decay_steps: 2, decay_type: x}",
            "'x' is not linear or cosine or 1-sqrt",
        ),
        ("polynomial", "{lr_end: 1}", "lr_end: 1 is not below training.learning_rate (0.004)"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_refused(schedule: str, given: str, words: str) -> None:
    problems = problems_of(f"training.lr_scheduler_type={schedule}", f"training.lr_scheduler_kwargs={given}")
    assert any(words in problem for problem in problems)
    assert all(problem.startswith("training.lr_scheduler_kwargs") for problem in problems)


def test_the_arguments_of_schedules_are_those_of_transformers() -> None:
    values = {
        name: {
            key: kind[0] if isinstance(kind, tuple) else 1 for key, kind in known.items() if key != "min_lr"
        }
        for name, known in ARGUMENTS.items()
    }
    values["polynomial"]["lr_end"] = 1e-6
    for name, given in values.items():
        assert list(wrong_schedule(name, given, 1.0)) == []
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        get_scheduler(name, optimizer, 1, 4, given)
    recipe = load_recipe(
        EMBEDDED,
        [
            "training.lr_scheduler_type=cosine_with_min_lr",
            "training.lr_scheduler_kwargs={min_lr: 1e-6}",  # text to YAML 1.1
        ],
    )
    assert recipe.training.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_numbers_that_yaml_reads_as_others_and_what_names_nothing_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    text = EMBEDDED.read_text()
    for before, after, words in (
        ("r: 16", "r: 010", "010 is another number in YAML"),
        ("seed: 42", "seed: 1:30", "1:30 is another number in YAML"),
        ("dataset: embedded", 'dataset: ""', "data.dataset: "),
        ("loss: answer", 'chat_template: "\\ud800"', "half a character"),
        ("micro_batch_tokens: 2800", f"micro_batch_tokens: {10**20}", "batch.micro_batch_tokens: "),
    ):
        assert text.count(before) == 1
        file.write_text(text.replace(before, after))
        with pytest.raises(ConfigError, match=words):
            load_recipe(file)


def test_an_override_changes_one_section_where_two_share_an_anchor(tmp_path: Path) -> None:
    values, often = yaml.safe_load(EMBEDDED.read_text()), {"every_steps": 10}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "evaluation": often, "checkpoint": often}))
    assert "*id001" in file.read_text()
    recipe = load_recipe(file, ["evaluation.every_steps=7"])
    assert (recipe.evaluation.every_steps, recipe.checkpoint.every_steps) == (7, 10)


@pytest.mark.parametrize("share", ["-0.1", "1.5", "0.1 %", "nan", "true"])
def test_a_share_to_recheck_that_is_none_is_refused_and_a_share_makes_no_other_run(share: str) -> None:
    (problem,) = problems_of(f"training.recheck={share}")
    assert problem.startswith("training.recheck: ")
    assert "a share of the micro-batches from 0 to 1" in problem
    checked = load_recipe(EMBEDDED, ["training.recheck=1e-3"])
    assert checked.training.recheck == 0.001
    assert recipe_fingerprint(checked) == recipe_fingerprint(load_recipe(EMBEDDED))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "not a recipe"),
        ("", "not a recipe"),
        ("name: a\nname: b\n", "appears twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    (problem,) = problems_of(path=file)
    assert problem.startswith(f"{file}: ")
    assert what in problem


@pytest.mark.parametrize(
    ("brought", "words"),
    [
        ("lora.rank=8", "lora.r"),
        ("batch.gradient_accumulation_steps=8", "batch.global_batch_size"),
        ("per_device_train_batch_size=4", "batch.global_batch_size"),
        ("batch.per_device_train_batch_size=4", "batch.global_batch_size"),
        ("batch.batch_size=4", "batch.global_batch_size"),
        ("num_gpus=8", "--gpus-per-node"),
        ("training.strategy=zero3", "--strategy"),
        ("lr=1", "training.learning_rate"),
        ("training.warmup_ratio=0.03", "training.warmup_steps"),
        ("training.max_seq_length=1024", "data.max_pixels"),
        ("model.model_name_or_path=x/y", "model.name_or_path"),
        ("training.eval_steps=5", "the section evaluation"),
    ],
)
def test_what_people_bring_from_other_tools_is_explained_in_any_section(brought: str, words: str) -> None:
    (problem,) = problems_of(brought)
    assert problem.startswith(f"{brought.partition('=')[0]}: refused; ")
    assert words in problem


def test_a_key_like_none_of_its_section_is_answered_with_the_section() -> None:
    (problem,) = problems_of("lora.xyz=1")
    keys = (
        "r, lora_alpha, lora_dropout, bias, target_modules, use_rslora, use_dora, rank_pattern, alpha_pattern"
    )
    assert problem == f"lora.xyz: unknown key; lora has {keys}"


@pytest.mark.parametrize(
    "override",
    [
        "model.name_or_path=Qwen/Qwen2 VL",
        "model.name_or_path=a/b/c",
        "model.name_or_path=Qwen/Qwen2--VL",
        "model.name_or_path=~no-such-user/base",
        f"model.name_or_path=/{'x' * 300}",
        'model.name_or_path="a\\nb/c"',
        "data.dataset=HuggingFaceM4/Chart QA",
        "data.dataset=owner/na\u00efve",
        f"data.dataset=owner/{'x' * 97}",
        "model.revision=../x",
        "model.revision=a b",
        'data.revision="\\0"',
        "data.revision=-x",
        "hub.repo_id=owner/name/more",
        'hub.repo_id=""',
        "tracking.space_id=my space",
        'tracking.project="\\e[31m"',
        "tracking.project=' '",
    ],
)
def test_a_name_that_nothing_can_have_is_refused_when_the_recipe_is_read(override: str) -> None:
    (problem,) = problems_of(override)
    assert problem.startswith(f"{override.partition('=')[0]}: ")
    assert problem.isprintable()
    assert ";" in problem


@pytest.mark.parametrize(
    "override",
    ["model.name_or_path=gpt2", "model.name_or_path=./not/yet", "data.dataset=a.b/c_d-e", "model.revision=refs/pr/1",
     "model.revision=v1.0+x", "hub.repo_id=me/it", "tracking.project=my charts, 2nd"],
)  # fmt: skip
def test_a_name_that_something_can_have_is_taken(override: str) -> None:
    load_recipe(find_recipe("embedded"), [override])


def test_missing_sections_and_keys_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict({"model": {}})
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {
        "name",
        "model.name_or_path",
        "data",
    }


def test_a_recipe_is_found_by_path_and_by_shipped_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("embedded", "embedded.yaml", "recipes/embedded.yaml"):
        assert find_recipe(name) == EMBEDDED
    own = tmp_path / "embedded.yaml"
    own.write_text("mine")
    assert find_recipe("embedded.yaml").read_text() == "mine"
    with pytest.raises(ConfigError, match="did you mean embedded"):
        find_recipe("embeded")
    with pytest.raises(ConfigError, match="no such recipe file"):
        find_recipe("elsewhere/embedded.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=1e-5",
        "training.seed=1",
        "training.max_steps=7",
        "lora.r=4",
        "model.revision=other",
        "data.train=train[:50%]",
        "data.loss=sequence",
        "batch.global_batch_size=64",
        "quantization.load_in_4bit=false",
    ],
)
def test_what_alters_the_numbers_alters_the_fingerprint(override: str) -> None:
    assert recipe_fingerprint(load_recipe(EMBEDDED, [override])) != recipe_fingerprint(load_recipe(EMBEDDED))


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "training.logging_steps=3",
        "training.gradient_checkpointing=true",
        "batch.micro_batch_tokens=4000",
        "data.on_bad_row=drop",
        "checkpoint.every_steps=7",
        "evaluation.every_steps=7",
        "tracking.report_to=none",
    ],
)
def test_what_does_not_alter_the_numbers_keeps_the_fingerprint(override: str) -> None:
    assert recipe_fingerprint(load_recipe(EMBEDDED, [override])) == recipe_fingerprint(load_recipe(EMBEDDED))


def test_the_fingerprint_does_not_depend_on_how_a_number_is_written() -> None:
    one, other = (load_recipe(EMBEDDED, [f"training.learning_rate={text}"]) for text in ("2e-4", "0.0002"))
    assert recipe_fingerprint(one) == recipe_fingerprint(other)


def test_the_shipped_schema_is_the_recipes_own() -> None:
    shipped = json.loads(resource("recipes", "recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "make it anew: samestep schema > recipes/recipe.schema.json"


def test_the_schema_names_every_section_and_forbids_others() -> None:
    schema = recipe_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainingSection"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0


def test_the_system_message_is_written_as_a_readable_block() -> None:
    text = dump_recipe(load_recipe(EMBEDDED))
    assert "system_message: |" in text
    assert yaml.safe_load(text)["training"]["learning_rate"] == load_recipe(EMBEDDED).training.learning_rate


def test_a_folder_called_embedded_does_not_change_the_embedded_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "embedded").mkdir()
    (tmp_path / "charts").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(EMBEDDED, ["model.name_or_path=charts"])
    assert recipe.data.dataset == "embedded"
    assert recipe.model.name_or_path == str(tmp_path / "charts")


BOMB = "&a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"z{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"name: {BOMB}", "more than 50,000 values"),
        (f"training: {{learning_rate: {'[' * 3000}{']' * 3000}}}", "nested too deeply"),
        ("training: &t {learning_rate: *t}", "is inside of what it stands for"),
        ("training: {seed: 1" + "0" * 5000 + "}", "an integer of more than 4,300 digits"),
        ("training: {seed: 0x" + "f" * 5000 + "}", "an integer is too large"),
        ("training: {seed: 2026-99-99}", "training.seed: must be a valid integer"),
        ("name: {" + ", ".join(f"k{n}: {n}" for n in range(2_000)) + "}", "name: must be a valid string"),
        ("".join(f"k{n}: 1\n" for n in range(5_000)), "more problems"),
        ("? " + "k" * 100_000 + "\n: 1", "unknown key"),
        ("x: " + "y" * 2**20, "is too large (1,048,579 bytes, at most 262,144 are read)"),
    ],
    ids=lambda text: text[:40],
)
def test_a_recipe_that_would_hang_its_reader_is_refused_in_lines(
    text: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_recipe(file)
    assert time.monotonic() - began < 20
    assert words in str(caught.value)
    assert len(caught.value.problems) <= 110
    assert max(map(len, caught.value.problems)) < 1000


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_a_recipe_is_a_plain_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="is no plain file"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("value", ["[" * 3000, "1" * 5000, "&a [*a]", "0x" + "f" * 5000, "{a: 1, a: 2}"])
def test_an_override_that_would_hang_its_reader_is_one_line(value: str) -> None:
    (line,) = problems_of(f"training.seed={value}")
    assert line.startswith("training.seed: must be a valid integer")
    assert len(line) < 300


def test_a_value_is_shown_no_further_than_it_is_read() -> None:
    """Whoever hands values over by another way than a file: they may have no end."""
    endless: list[object] = []
    endless.append(endless)
    for value in (endless, 10**5000, {"a": [{}] * 10**6}, float("nan"), "x" * 10**6):
        with pytest.raises(ConfigError) as caught:
            recipe_from_dict({"name": "a", "training": {"seed": value}})
        assert max(map(len, caught.value.problems)) < 500
