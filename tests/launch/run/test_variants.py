"""Names of what answers: parsed, ordered, and refused in one line."""

from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.run.variants import (
    from_worse_to_better,
    in_order,
    parse_models,
    parse_variant,
    prompt_option,
    with_prompt,
)


def test_a_name_says_whose_weights_answer_and_under_which_system_message() -> None:
    name = parse_variant("checkpoint-40-no-prompt")
    assert (name.weights, name.step, name.prompt) == ("checkpoint-40", 40, "-no-prompt")
    assert parse_variant("base-prompt-short.v2").prompt == "-prompt-short.v2"
    assert parse_variant("best").step is None
    for wrong in (
        "",
        "bass",
        "base-",
        "checkpoint-",
        "checkpoint-04",
        "checkpoint-4.partial",
        "base-no-prompt-x",
    ):
        with pytest.raises(ValueError, match="names nothing"):
            parse_variant(wrong)


def test_models_are_named_once_each_and_unknown_ones_are_refused() -> None:
    assert parse_models("base, adapter,base") == "base,adapter"
    with pytest.raises(ConfigError, match=r"--models: unknown bass, 'a.x1bb'; choose of base"):
        parse_models("base,bass,a\x1bb")
    with pytest.raises(ConfigError, match="unknown base-prompt-x"):
        parse_models("base-prompt-x")  # whose text nobody gave


def test_a_table_goes_from_the_base_to_what_was_made_of_it() -> None:
    models = [
        "merged",
        "adapter",
        "checkpoint-100",
        "base",
        "best",
        "checkpoint-20",
        "base-no-prompt",
        "shuffled",
    ]
    assert in_order(models) == [
        *(
            "base-no-prompt",
            "base",
            "checkpoint-20",
            "checkpoint-100",
            "adapter",
            "best",
            "shuffled",
            "merged",
        )
    ]
    assert from_worse_to_better(models)[:4] == ["base-no-prompt", "base", "merged", "shuffled"]


def test_another_system_message_is_asked_of_every_model_that_names_none(tmp_path: Path) -> None:
    assert with_prompt(["base", "base-no-prompt", "adapter"], "-no-prompt") == (
        "base-no-prompt",
        "adapter-no-prompt",
    )
    assert prompt_option("recipe") == ("", None)
    assert prompt_option("none") == ("-no-prompt", None)
    file = tmp_path / "be brief.txt"
    file.write_text("Be brief.\n")
    assert prompt_option(str(file)) == ("-prompt-be-brief", file)
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="holds no text"):
        prompt_option(str(file))
    with pytest.raises(ConfigError, match=r"cannot be read .*; give none, recipe or a text file"):
        prompt_option(str(tmp_path / "nothing"))
