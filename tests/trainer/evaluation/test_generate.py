"""Answers: those of plain calls, for any number of ranks; their figures; failures that all ranks share."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from launch.checkpoints.publish import publish
from launch.inputs.dataset_index import read_index
from launch.inputs.identity import MODEL_PARTS, find_identity
from launch.planning.plan import Plan
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.evaluation_target import find_target
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter, write_run
from tests.helpers.distributed.forked import forked_launch
from trainer.data.images import decode_image
from trainer.data.rows import chat
from trainer.data.splits import open_split
from trainer.evaluation.answering import answer_all
from trainer.evaluation.generate import main
from trainer.evaluation.questions import Question, evenly_spaced, make_batches, other_images
from trainer.evaluation.request import EvaluationRequest
from trainer.evaluation.result import next_commands, print_result
from trainer.evaluation.result_file import Kept, with_earlier_answers
from trainer.formats.portable import save_adapter
from trainer.pretrained import load_processor

OLD_RUN = Path(__file__).parents[2] / "data" / "run_of_c54213f" / "straight"


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["evaluation"] |= {"max_new_tokens": 6, "batch_size": 4}
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(recipe, tmp_path_factory.mktemp("runs") / "answers")


@pytest.fixture(scope="module")
def result(run: RunDirectory) -> dict[str, Any]:
    """eval.json of one process."""
    assert main(["--run-dir", str(run.path)]) == 0
    written: dict[str, Any] = json.loads(run.eval_file().read_text())
    return written


@torch.no_grad()
def plain_answer(model: Any, processor: Any, recipe: Recipe, row: Any, image: bytes) -> str:
    """One question alone, the way the documentation of transformers does it."""
    text = processor.apply_chat_template(
        chat(recipe.data.system_message, row.turns[:-1]), tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[decode_image(image)], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text.strip())


def test_every_answer_is_the_one_of_a_plain_call_on_that_question_alone(
    recipe: Recipe, result: dict[str, Any]
) -> None:
    model, processor, rows = random_adapter(recipe), load_processor(recipe), open_split(recipe, "test")
    assert [each["row"] for each in result["predictions"]] == list(range(12))
    for each in result["predictions"]:
        row = rows[each["row"]]
        assert (each["query"], each["label"]) == (row.query, row.label)
        assert each["adapter"]["prediction"] == plain_answer(model, processor, recipe, row, row.images[0])
        shown = rows[each["shuffled"]["image_of_row"]].images[0]
        assert shown != row.images[0]
        assert each["shuffled"]["prediction"] == plain_answer(model, processor, recipe, row, shown)
        with model.disable_adapter():
            assert each["base"]["prediction"] == plain_answer(model, processor, recipe, row, row.images[0])
    answers = [
        [each[model]["prediction"] for each in result["predictions"]]
        for model in ("base", "adapter", "shuffled")
    ]
    assert answers[0] != answers[1] != answers[2]


def test_the_figures_count_every_question_once(result: dict[str, Any]) -> None:
    for of_model in result["accuracy"].values():
        assert [of_model[group]["count"] for group in ("human", "augmented", "overall")] == [6, 6, 12]
    for model, of_model in result["accuracy"].items():
        assert of_model["overall"]["correct"] == sum(each[model]["correct"] for each in result["predictions"])
        low, high = of_model["overall"]["interval"]
        assert low <= of_model["overall"]["percent"] <= high
    assert result["mcnemar_p"].keys() == {"base -> adapter", "shuffled -> adapter", "base -> shuffled"}
    outcomes = [(each["base"]["correct"], each["adapter"]["correct"]) for each in result["predictions"]]
    pair = result["paired"]["base -> adapter"]
    assert pair["gained"] == outcomes.count((False, True))
    assert pair["lost"] == outcomes.count((True, False))


def test_two_ranks_give_the_same_answers_and_share_a_failure(
    run: RunDirectory, result: dict[str, Any]
) -> None:
    run.eval_file().unlink()
    shutil.rmtree(run.answers)
    launched = forked_launch(2, ["tests.helpers.distributed.answer_twice", "--run-dir", str(run.path)])
    assert launched.returncode == 0, launched.stdout
    assert launched.stdout.count("failed with 1") == 2
    assert launched.stdout.count("error: rank 1: an image cannot be read") == 1
    again = json.loads(run.eval_file().read_text())
    assert again["world_size"] == 2
    assert again["predictions"] == result["predictions"]
    assert again["accuracy"] == result["accuracy"]
    assert {len(list(folder.glob("rank-*.jsonl"))) for folder in run.answers.iterdir()} == {2}


def test_the_table_names_paths_and_the_next_commands(
    run: RunDirectory,
    result: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run.path.parent)
    assert main(["--run-dir", "answers", "--max-samples", "5", "--models", "adapter", "--split", "test"]) == 0
    shown = capsys.readouterr().out
    assert "5 questions of test" in shown
    assert "answers/eval-5.json" in shown
    assert "merge answers" in shown
    assert "\nproducts: float32\n" in shown
    assert [line.split()[1] for line in shown.partition("next:")[2].strip().splitlines()] == ["merge", "plan"]
    shutil.copyfile(OLD_RUN / "plan.json", run.plan_file)
    _, longer, _ = next_commands(run)
    run.plan_file.unlink()
    steps = Plan.read(OLD_RUN / "plan.json").max_steps
    assert longer.endswith(f"--name answers-longer --set training.max_steps={2 * steps}")
    written = json.loads(run.eval_file("test", 5).read_text())
    assert [each["row"] for each in written["predictions"]] == [0, 2, 4, 7, 9]
    assert len(json.loads(run.eval_file().read_text())["predictions"]) > 5


def test_the_products_of_every_model_are_said_and_that_a_training_had_others(
    run: RunDirectory, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert result["products"] == dict.fromkeys(result["accuracy"], "float32")
    mixed = {**result, "products": {"base": "float32", "adapter": None, "merged": "bfloat16"}}
    request = EvaluationRequest(run, "test", ("base",), None, overrides=("model.products=fp8",))
    print_result(Kept(mixed), request, Console(soft_wrap=True))
    dtypes = "float32 (base), unknown (an older version) (adapter), bfloat16 (merged)"
    assert f"\nproducts: {dtypes}; the recipe trains with fp8\n" in capsys.readouterr().out


def test_what_is_evaluated_is_held_against_what_was_trained(
    world: Path, recipe: Recipe, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "data.test.rows"
    assert set(result["identity"]) == {*MODEL_PARTS, rows}
    assert result["differs"] == {}
    run = write_run(recipe, tmp_path / "run")
    index = read_index(recipe)
    assert index is not None
    identity = find_identity(recipe, index).parts | {"model.processor": "a" * 32, rows: "b" * 64}
    shutil.copytree(run.adapter, tmp_path / "aside")
    publish(tmp_path / "aside", run.checkpoint(3), {"step": 3, "identity": identity})
    asked = ["--run-dir", str(run.path), "--models", "base", "--max-samples", "2"]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "model.processor: checkpoint-3/manifest.json has 'aaaaaaaaaaaa', here it is '" in said
    assert f"{rows}: checkpoint-3/manifest.json has 'bbbbbbbbbbbb', here it is '" in said
    assert main([*asked, "--allow", "model.content", "--allow", rows]) == 0
    written = json.loads(run.eval_file("test", 2).read_text())
    assert written["differs"].keys() == {"model.processor", rows}
    assert written["differs"]["model.processor"]["run"] == "a" * 32


def test_answers_of_other_models_stay_and_those_of_other_weights_are_kept_under_another_name(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = RunDirectory(
        shutil.copytree(run.path, tmp_path / "here", ignore=shutil.ignore_patterns("eval*", "answers"))
    )
    asked = ["--run-dir", str(here.path), "--max-samples", "4", "--models"]
    file = here.eval_file("test", 4)
    assert main([*asked, "base"]) == 0
    base = json.loads(file.read_text())
    assert main([*asked, "adapter"]) == 0
    both = json.loads(file.read_text())
    assert list(both["accuracy"]) == ["base", "adapter"]
    assert both["accuracy"]["base"] == base["accuracy"]["base"]
    assert [each["base"] for each in both["predictions"]] == [each["base"] for each in base["predictions"]]
    assert both["mcnemar_p"].keys() == {"base -> adapter"}
    assert both["finished_of"]["base"] == base["finished"]
    assert f"base: answers of {base['finished']}, kept" in capsys.readouterr().out
    assert not list(here.path.glob("eval-4.*-*"))

    weights = here.adapter / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
    assert main([*asked, "shuffled"]) == 0
    now = json.loads(file.read_text())
    assert list(now["accuracy"]) == ["base", "shuffled"]
    (old,) = here.path.glob("eval-4.*-*")
    assert json.loads(old.read_text()) == both
    assert f"that one is now {old}" in capsys.readouterr().out


def test_answers_are_of_the_weights_that_gave_them(
    run: RunDirectory, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on replaces its adapter while the questions are answered."""
    here = RunDirectory(
        shutil.copytree(run.path, tmp_path / "here", ignore=shutil.ignore_patterns("eval*", "answers"))
    )
    weights = here.adapter / "adapter_model.safetensors"

    def answers_meanwhile(*words: Any) -> Any:
        found = answer_all(*words)
        save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights)
        return found

    monkeypatch.setattr("trainer.evaluation.generate.answer_all", answers_meanwhile)
    asked = ["--run-dir", str(here.path), "--max-samples", "4", "--models"]
    assert main([*asked, "adapter"]) == 0
    file = here.eval_file("test", 4)
    assert json.loads(file.read_text())["weights"] == {"adapter": result["weights"]["adapter"]}
    monkeypatch.undo()
    assert main([*asked, "base"]) == 0
    assert list(json.loads(file.read_text())["accuracy"]) == ["base"]


def test_answer_files_of_older_versions_are_read(result: dict[str, Any], tmp_path: Path) -> None:
    new = {"weights", "products", "finished_of", "prompts_sha256"}
    older = {key: value for key, value in result.items() if key not in new}
    only_base = {**result, "accuracy": {"base": result["accuracy"]["base"]}}
    weights: dict[str, str | None] = {"base": None, "adapter": "a", "shuffled": "a", "merged": None}
    file, adapter = tmp_path / "eval.json", tmp_path / "adapter"
    file.write_text(json.dumps(older))
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    os.utime(adapter / "adapter_model.safetensors", (1, 1))  # no younger than the answers
    kept = with_earlier_answers(only_base, file, weights, adapter)
    assert (kept.models, kept.aside) == (("adapter", "shuffled"), None)
    assert kept.result["accuracy"] == result["accuracy"]
    assert kept.result["products"] == {"base": "float32", "adapter": None, "shuffled": None}
    # Scored by the rule of now, and what the file said of a base that was not asked again stays said.
    spoilt = json.loads(json.dumps(older))
    spoilt["predictions"][0]["adapter"]["correct"] = not spoilt["predictions"][0]["adapter"]["correct"]
    spoilt["differs"] = {"model.weights": {"run": "a", "here": "b"}}
    file.write_text(json.dumps(spoilt))
    fewer = {key: value for key, value in result["identity"].items() if key != "model.weights"}
    kept = with_earlier_answers({**only_base, "identity": fewer}, file, weights, adapter)
    assert kept.result["accuracy"] == result["accuracy"]
    assert kept.result["predictions"] == result["predictions"]
    assert kept.result["identity"] == result["identity"]
    assert kept.result["differs"].keys() == {"model.weights"}
    file.write_text(json.dumps(older))
    soon = time.time() + 60
    os.utime(adapter / "adapter_model.safetensors", (soon, soon))  # trained on since
    kept = with_earlier_answers(only_base, file, weights, adapter)
    assert kept.models == ()
    assert kept.aside is not None
    file.write_text(json.dumps({**older, "max_new_tokens": 7}))
    assert with_earlier_answers(only_base, file, weights, adapter).aside is not None
    file.write_text("half")  # is not thrown away either
    assert with_earlier_answers(only_base, file, weights, adapter).aside is not None
    file.unlink()
    assert with_earlier_answers(only_base, file, weights, adapter).aside is None


def test_a_checkpoint_is_evaluated_by_its_path(
    run: RunDirectory, recipe: Recipe, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    aside = run.path / "checkpoint-3.partial"
    save_adapter(random_adapter(recipe), aside)
    publish(aside, run.checkpoint(3), {"step": 3})
    run.plan_file.touch()
    found = [find_target(str(place), Path("runs")) for place in (run.checkpoint(3), run.path, run.adapter)]
    assert [(target.run, target.checkpoint) for target in found] == [(run, 3), (run, None), (run, None)]
    asked = ["--run-dir", str(run.path), "--checkpoint", "3", "--models"]
    assert main([*asked, "adapter"]) == 0
    written = json.loads(run.eval_file(checkpoint=3).read_text())
    assert run.eval_file(checkpoint=3).name == "eval-checkpoint-3.json"
    (folder,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("adapter  "))
    assert folder.endswith("checkpoint-3")
    answers = [[each["adapter"] for each in one["predictions"]] for one in (written, result)]
    assert answers[0] == answers[1]
    assert main([*asked, "merged"]) == 2
    assert "merged is of the run's last adapter, not of checkpoint-3" in capsys.readouterr().err
    (run.checkpoint(3) / "adapter_config.json").write_text("{}")
    assert main([*asked, "adapter"]) == 2
    assert "has another size" in capsys.readouterr().err


def test_what_is_missing_is_refused_with_what_to_do(
    run: RunDirectory, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run-dir", str(tmp_path)]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["--run-dir", str(tmp_path), "--models", "adapter,merged"]) == 2
    shown = capsys.readouterr().err
    assert "no adapter yet" in shown
    assert "samestep merge" in shown
    assert main(["--run-dir", str(run.path), "--max-samples", "1"]) == 2
    assert "all questions are on one image" in capsys.readouterr().err
    for wrong in (["--models", "bass"], ["--max-samples", "0"], ["--split", "val"]):
        with pytest.raises(SystemExit) as ended:
            main(["--run-dir", str(run.path), *wrong])
        assert ended.value.code == 2
    assert not list(tmp_path.glob("*.json"))


def test_no_question_keeps_its_image_and_every_call_shuffles_alike() -> None:
    questions = [Question(row, "", ("",), 0, "", row % 5, 1, 1) for row in range(23)]
    others = other_images(questions)
    assert others == other_images(questions)
    assert all(
        questions[other].image_row != question.image_row
        for question, other in zip(questions, others, strict=True)
    )
    assert len({questions[other].image_row for other in others}) == 5


def test_batches_hold_every_question_once_and_chosen_samples_are_spread() -> None:
    batches = make_batches([3, 9, 1, 9, 4, 2, 8], size=3)
    assert batches == [[1, 3, 6], [4, 0, 5], [2]]
    assert evenly_spaced(10, None) == list(range(10))
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 8) == [0, 1, 2]
