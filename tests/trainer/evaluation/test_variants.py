"""Variants side by side: other system messages, checkpoints, adapters and models of elsewhere; answers are kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from launch.checkpoints.publish import publish
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.evaluation_target import find_target
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter, write_run
from tests.helpers.merging import merge
from trainer.data.encoder import Encoder
from trainer.data.images import decode_image
from trainer.data.rows import chat
from trainer.data.splits import open_split
from trainer.evaluation.generate import main
from trainer.evaluation.loading import answering_as, hold_dequantized, load_with_adapters
from trainer.evaluation.request import EvaluationRequest, variants_of
from trainer.formats.portable import save_adapter
from trainer.generation.replica import Replica
from trainer.model.base import load_base
from trainer.pretrained import load_processor

SAMPLES = ["--max-samples", "6"]


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["evaluation"] |= {"max_new_tokens": 6, "batch_size": 2}
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """With an adapter, and a checkpoint of another one."""
    run = write_run(recipe, tmp_path_factory.mktemp("variants") / "run")
    model = random_adapter(recipe)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = -parameter.data.roll(1)
    save_adapter(model, run.path / "aside")
    publish(run.path / "aside", run.checkpoint(3), {"step": 3})
    return run


def evaluate(run: RunDirectory, *arguments: str) -> dict[str, Any]:
    """eval-6.json of an evaluation in this process."""
    assert main(["--run-dir", str(run.path), *SAMPLES, *arguments]) == 0
    written: dict[str, Any] = json.loads(run.eval_file("test", 6).read_text())
    return written


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of a model had."""
    sizes: list[int] = []
    honest = Replica.answers

    def counting(self: Replica, prompts: Sequence[str], images: Sequence[int]) -> list[str]:
        sizes.append(len(prompts))
        return honest(self, prompts, images)

    monkeypatch.setattr(Replica, "answers", counting)
    return sizes


def predictions(result: dict[str, Any], model: str) -> list[str]:
    return [each[model]["prediction"] for each in result["predictions"]]


def test_a_variant_is_asked_with_its_own_system_message(
    recipe: Recipe, run: RunDirectory, tmp_path: Path
) -> None:
    file = tmp_path / "brief.txt"
    file.write_text("Be brief.\n")
    result = evaluate(run, "--models", "base,base-no-prompt,base-prompt-brief", "--prompt-file", str(file))
    assert list(result["accuracy"]) == ["base-no-prompt", "base-prompt-brief", "base"]
    model, processor = load_base(recipe, torch.device("cpu")).eval(), load_processor(recipe)
    rows = open_split(recipe, "test")
    for name, message in (("base-no-prompt", None), ("base-prompt-brief", "Be brief.")):
        for each in result["predictions"]:
            row = rows[each["row"]]
            text = processor.apply_chat_template(
                chat(message, row.turns[:-1]), tokenize=False, add_generation_prompt=True
            )
            inputs = processor(text=[text], images=[decode_image(row.images[0])], return_tensors="pt")
            with torch.no_grad():
                output = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
            new = output[0, inputs["input_ids"].shape[1] :]
            assert (
                each[name]["prediction"] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
            )
    assert len({tuple(predictions(result, model)) for model in result["accuracy"]}) == 3
    assert len(set(result["prompts"].values())) == 3
    file.write_text(
        "Be very brief.\n"
    )  # other answers under the same name: the older ones stay in their file
    again = evaluate(run, "--models", "base-prompt-brief", "--prompt-file", str(file))
    assert again["prompts"]["base-prompt-brief"] != result["prompts"]["base-prompt-brief"]
    (older,) = run.path.glob("eval-6.2*")
    assert json.loads(older.read_text()) == result


def test_nothing_is_asked_twice_and_a_killed_evaluation_goes_on(
    run: RunDirectory, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = RunDirectory(
        shutil.copytree(run.path, tmp_path / "here", ignore=shutil.ignore_patterns("eval*", "answers"))
    )
    counting = Replica.answers

    def killed(self: Replica, prompts: Sequence[str], images: Sequence[int]) -> list[str]:
        if len(asked) == 4:
            raise KeyboardInterrupt
        return counting(self, prompts, images)

    monkeypatch.setattr(Replica, "answers", killed)
    models = ["--models", "base,adapter,checkpoint-3"]
    with pytest.raises(KeyboardInterrupt):
        main(["--run-dir", str(here.path), *SAMPLES, *models])
    assert asked == [2, 2, 2, 2]
    monkeypatch.setattr(Replica, "answers", counting)
    result = evaluate(here, *models)
    assert asked == [2] * 9  # 3 batches of 3 models
    assert len({tuple(predictions(result, model)) for model in result["accuracy"]}) == 3
    monkeypatch.setattr("trainer.evaluation.loading.load_base", None)  # no model is even loaded
    again = evaluate(here, *models)
    assert asked == [2] * 9
    assert again["predictions"] == result["predictions"]
    assert main(["--run-dir", str(here.path), "--max-samples", "3", "--models", "adapter"]) == 0
    assert asked == [2] * 9


def test_answers_of_other_weights_or_another_length_are_asked_anew(
    run: RunDirectory, recipe: Recipe, asked: list[int], tmp_path: Path
) -> None:
    here = RunDirectory(shutil.copytree(run.path, tmp_path / "here"))
    evaluate(here, "--models", "adapter")
    before = len(asked)
    shutil.rmtree(here.adapter)
    shutil.copytree(here.checkpoint(3), here.adapter)
    (here.adapter / "manifest.json").unlink()
    result = evaluate(here, "--models", "adapter,checkpoint-3")
    assert predictions(result, "adapter") == predictions(result, "checkpoint-3")
    assert len(asked) == before + 3  # the same weights under two names are asked once
    longer = recipe.model_copy(
        update={"evaluation": recipe.evaluation.model_copy(update={"max_new_tokens": 7})}
    )
    here.recipe_file.write_text(dump_recipe(longer))
    evaluate(here, "--models", "adapter")
    assert len(asked) == before + 6


def test_weights_held_dequantized_give_the_same_answers(world: Path, tmp_path: Path) -> None:
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = True
    values["evaluation"] |= {"max_new_tokens": 6}
    recipe = recipe_from_dict(values)
    run = write_run(recipe, tmp_path / "run")
    variants = variants_of(EvaluationRequest(run, "test", ("base", "adapter"), None), recipe)
    processor, rows = load_processor(recipe), open_split(recipe, "test")
    encoder = Encoder(processor, recipe.data.system_message, "answer")
    prompts = [encoder.texts(rows[number])[0] for number in range(4)]

    def answers(model: Any) -> list[list[str]]:
        found = []
        for variant in variants:
            with answering_as(model, variant):
                found.append(Replica(model, processor, rows, 6, torch.float32).answers(prompts, range(4)))
        return found

    model = load_with_adapters(recipe, torch.device("cpu"), variants)
    before = answers(model)
    assert not hold_dequantized(model, torch.float32, room=1000)
    assert hold_dequantized(model, torch.float32, room=10**9)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert not hold_dequantized(model, torch.float32, room=10**9)  # once
    assert answers(model) == before
    assert before[0] != before[1]


def test_an_adapter_of_elsewhere_is_asked_on_the_recipes_base(
    run: RunDirectory, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = shutil.copytree(run.adapter, tmp_path / "theirs")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    target = find_target(str(theirs), tmp_path / "runs", str(file))
    target.run.path.mkdir(parents=True)
    words = [*target.flags(), *SAMPLES, "--models", "base,adapter", "--json"]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    written = json.loads(target.run.eval_file("test", 6, label=target.label).read_text())
    assert shown["file"].endswith(f"runs/small/eval-{target.label}-6.json")
    assert "predictions" not in shown
    assert shown["accuracy"] == written["accuracy"]
    expected = evaluate(run, "--models", "adapter")
    assert predictions(written, "adapter") == predictions(expected, "adapter")


def test_a_model_of_elsewhere_is_asked_as_it_is_stored(
    run: RunDirectory, recipe: Recipe, tmp_path: Path
) -> None:
    merge(run.path, tmp_path / "merged")
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    target = find_target(str(tmp_path / "merged"), tmp_path / "runs", str(file))
    target.run.path.mkdir(parents=True)
    assert main([*target.flags(), *SAMPLES, "--models", ",".join(target.models)]) == 0
    written = json.loads(target.run.eval_file("test", 6, label=target.label).read_text())
    assert predictions(written, "base") == predictions(evaluate(run, "--models", "adapter"), "adapter")


def test_a_checkpoint_that_is_rotated_away_keeps_its_answers(run: RunDirectory, tmp_path: Path) -> None:
    here = RunDirectory(shutil.copytree(run.path, tmp_path / "here"))
    before = evaluate(here, "--models", "checkpoint-3")
    shutil.rmtree(here.checkpoint(3))
    after = evaluate(here, "--models", "base")
    assert predictions(after, "checkpoint-3") == predictions(before, "checkpoint-3")
    assert after["weights"]["checkpoint-3"] == before["weights"]["checkpoint-3"]
    assert "base -> checkpoint-3" in after["paired"]


def test_a_damaged_checkpoint_and_a_missing_prompt_are_refused(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = RunDirectory(shutil.copytree(run.path, tmp_path / "here"))
    (here.checkpoint(3) / "adapter_config.json").write_text("{}")
    asked = ["--run-dir", str(here.path), *SAMPLES, "--models"]
    assert main([*asked, "checkpoint-3"]) == 2
    assert "has another size" in capsys.readouterr().err
    assert main([*asked, "base-prompt-x"]) == 2
    assert "needs its file; give it with --prompt" in capsys.readouterr().err
