"""What differs between a run and a request: named with both values, refused, or allowed by name."""

import pytest

from launch.errors import ConfigError
from launch.inputs.identity import MODEL_PARTS, OWN_TEMPLATE, PARTS, RunIdentity
from launch.recipe.fingerprint import altering_values
from launch.run.changes import (
    CONTENT_KEYS,
    Change,
    changes,
    consequences,
    content_changes,
    refuse_changes,
    refuse_unknown_keys,
    still_allowed,
    tie_contents,
)
from tests.helpers.indexes import embedded_recipe

OLD = altering_values(embedded_recipe())
KEYS = [*OLD, *CONTENT_KEYS, *PARTS]


def changed(*overrides: str) -> list[Change]:
    return changes(OLD, altering_values(embedded_recipe(*overrides)))


def refusal(found: list[Change], *allowed: str) -> list[str]:
    """The problems of the refusal, which there must be."""
    with pytest.raises(ConfigError) as caught:
        refuse_changes(found, allowed, "runs/x")
    return caught.value.problems


def test_equal_recipes_differ_in_nothing_and_nothing_is_refused() -> None:
    assert changed("training.logging_steps=1", "batch.micro_batch_tokens=5000", "name=other") == []
    refuse_changes([], (), "runs/x")


def test_every_change_is_named_with_both_values_and_the_key_to_allow() -> None:
    found = changed("training.learning_rate=0.5", "batch.global_batch_size=16", "data.loss=sequence")
    *lines, place = refusal(found)
    assert lines == [
        "batch.global_batch_size: the run has 32, the recipe 16; "
        "give the run's value, or --allow batch.global_batch_size",
        "data.loss: the run has 'answer', the recipe 'sequence'; give the run's value, or --allow data.loss",
        f"training.learning_rate: the run has {OLD['training.learning_rate']}, the recipe 0.5; "
        "give the run's value, or --allow training.learning_rate",
    ]
    assert place == (
        "runs/x: was begun otherwise (values that differ: 3); choose another --name, "
        "or --fresh to move the old run aside"
    )


def test_only_what_is_named_is_allowed() -> None:
    found = changed("training.learning_rate=0.5", "training.seed=7")
    refuse_changes(found, ("training.seed", "training.learning_rate"), "runs/x")
    (line, place) = refusal(found, "training.seed", "training.weight_decay", "training", "data.content")
    assert line.startswith("training.learning_rate: ")
    assert "values that differ: 1" in place


@pytest.mark.parametrize(
    ("override", "key"),
    [("lora.r=4", "lora.r"), ("lora.target_modules=[q_proj]", "lora.target_modules")],
)
def test_what_the_stored_adapter_is_made_of_is_never_allowed(override: str, key: str) -> None:
    found = changed(override, "training.seed=7")
    never, other, _ = refusal(found)
    assert never.startswith(f"{key}: the run has ")
    assert "which no --allow changes" in never
    assert other.startswith("training.seed")
    assert len(refusal(found, key, "training.seed")) == 2


@pytest.mark.parametrize(
    ("key", "allowed", "other"),
    [
        (
            "data.train.rows",
            ["data.content", "data.dataset", "data.revision", "data.train"],
            "data.validation",
        ),
        ("data.test.rows", ["data.content", "data.dataset", "data.test", "data.test.rows"], "data.train"),
        *(
            (part, [part, "model.content", "model.name_or_path", "model.revision"], "model.dtype")
            for part in MODEL_PARTS
        ),
        ("model.content", ["model.content", "model.name_or_path", "model.revision"], "model.dtype"),
    ],
)
def test_another_dataset_or_base_has_another_content_and_no_other_value_has(
    key: str, allowed: list[str], other: str
) -> None:
    found = [Change(key, "a" * 12, "b" * 12)]
    for name in allowed:
        refuse_changes(found, [name], "runs/x")
    assert refusal(found, other, key.partition(".")[0])[0].startswith(f"{key}: the run has 'aaaa")


def test_an_allowance_of_contents_is_of_those_that_are_there_now_and_of_no_later_ones() -> None:
    now = {"data.train.rows": "a" * 64, "model.processor": "b" * 64}
    tied = tie_contents(["data.dataset", "model.content", "training.seed"], now)
    assert tied == [
        "data.dataset",
        f"data.train.rows={'a' * 12}",
        f"model.processor={'b' * 12}",
        "training.seed",
    ]
    assert tie_contents(tied, now) == tied
    for key, content in now.items():
        refuse_changes([Change(key, "x" * 64, content)], tied, "runs/x")
        assert f"--allow {key}" in refusal([Change(key, content, "c" * 64)], *tied)[0]
    assert tie_contents(tied, dict.fromkeys(now, "c" * 64)) == tied
    anew = still_allowed(tied, ["data.revision"])
    assert anew == ["data.dataset", f"model.processor={'b' * 12}", "training.seed"]
    assert still_allowed(tied, ["model.content"]) == tied[:2] + tied[3:]
    refuse_changes([Change("data.train.rows", "a" * 64, "c" * 64)], [*anew, "data.revision"], "runs/x")


def test_what_an_older_version_allowed_of_the_data_holds_for_its_rows() -> None:
    found = [Change("data.train.rows", "a" * 64, "b" * 64)]
    refuse_changes(found, [f"data.content={'b' * 12}", "data.dataset"], "runs/x")
    refusal(found, f"data.content={'c' * 12}", "data.dataset")


def test_each_part_that_differs_is_named_with_both_digests_and_an_unknown_one_is_not_compared() -> None:
    old = RunIdentity({"model.weights": "a" * 32, "model.processor": "b" * 32, "data.test.rows": "c" * 64})
    now = RunIdentity(dict.fromkeys(PARTS, "d" * 32) | {"model.weights": "a" * 32})
    lines = refusal(content_changes(old, now))
    assert lines[0].startswith(
        "model.processor: the run has 'bbbbbbbbbbbb', here it is 'dddddddddddd' (processor_config.json, "
    )
    assert lines[0].endswith("--allow model.processor")
    assert lines[1].startswith("data.test.rows: the run has 'cccccccccccc', here it is 'dddddddddddd'")
    assert len(lines) == 3
    assert old.missing() == [part for part in PARTS if part not in (*old.parts, OWN_TEMPLATE)]


def test_a_key_that_one_side_does_not_know_is_a_change() -> None:
    assert changes({"training.old": 1}, {"training.new": 2}) == [
        Change("training.new", None, 2),
        Change("training.old", 1, None),
    ]


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("training.lerning_rate", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("training.learning_rate=1e-4", "training.learning_rate"),
        ("data.contents", "data.content"),
        ("batch_size", "batch.global_batch_size"),
    ],
)
def test_an_allowance_of_nothing_names_the_nearest_key(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_unknown_keys(["training.seed", given, "zzz"], list(OLD))
    first, second = caught.value.problems
    assert first.startswith(f"--allow {given}: no value of a run has that name")
    assert first.endswith(f"did you mean {nearest}?")
    assert second.endswith("; name a key that the refusal names")


def test_several_keys_in_one_allowance_are_to_be_given_one_by_one() -> None:
    with pytest.raises(ConfigError, match="give one key, and --allow again for each further one"):
        refuse_unknown_keys(["training.seed,lora.r"], list(OLD))


def test_everything_that_can_be_refused_can_be_named() -> None:
    refuse_unknown_keys(KEYS, list(OLD))


@pytest.mark.parametrize("key", KEYS)
def test_every_allowed_change_has_a_consequence_of_its_kind(key: str) -> None:
    (line,) = consequences([Change(key, "before", "after")])
    assert line.startswith(f"{key}: 'before' -> 'after'; ")
    assert len(line.partition("; ")[2]) > 20


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("batch.global_batch_size", "nothing skipped or seen twice"),
        ("training.num_train_epochs", "learning-rate schedule is computed for the new number of steps"),
        ("training.max_steps", "a rate that had decayed rises again"),
        ("training.seed", "some a second time, some not at all"),
        ("lora.lora_alpha", "the loss jumps"),
        ("data.train.rows", "sees the new data"),
        ("data.validation.rows", "what is trained stays the same"),
        ("model.processor", "the images become other numbers"),
        ("model.chat_template", "other words"),
        ("data.validation", "what is trained stays the same"),
        ("model.content", "other weights"),
        ("quantization.bnb_4bit_quant_type", "quantized in another way"),
        ("of_another.version", "uses the new value"),
    ],
)
def test_the_consequence_says_what_happens_to_the_rest_of_the_run(key: str, words: str) -> None:
    (line,) = consequences([Change(key, 1, 2)])
    assert words in line


def test_of_long_values_the_difference_is_shown() -> None:
    system = "You are a Vision Language Model specialized in interpreting visual data from chart images.\n"
    line = str(Change("data.system_message", f"{system}Be brief. {system}", f"{system}Be long. {system}"))
    assert "Be brief." in line
    assert "Be long." in line
    assert len(line) < 220
    assert "\n" not in line
    shown = Change("k", [1] * 100, [1] * 99).shown()
    assert shown[0] != shown[1]
    assert all(len(text) < 70 for text in shown)
