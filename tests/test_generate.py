"""Answers: those of plain calls, for any number of ranks; their figures; failures that all ranks share."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from launch.recipe import Recipe, dump_recipe, recipe_from_dict
from launch.run_directory import RunDirectory
from trainer.checkpoint.portable import save_adapter
from trainer.data.chartqa import chat, decode_image, open_split
from trainer.evaluation.generate import Question, main, make_batches, other_images, spread
from trainer.model.base import add_lora, load_base
from trainer.model.tiny import random_tiny
from trainer.pretrained import load_processor

SIZES = ((84, 84), (112, 56), (140, 112), (56, 140), (84, 140))


def chart(number: int) -> bytes:
    """A PNG with one bar; every number another picture."""
    image = Image.new("RGB", SIZES[number % len(SIZES)], (255, 255, 255))
    ImageDraw.Draw(image).rectangle(
        (5, 5, 20 + 4 * number, 40), fill=(40 * number % 256, 90, 200 - 20 * number)
    )
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def write_split(folder: Path, split: str, count: int) -> None:
    rows = [
        {
            "image": {"bytes": chart(number // 2), "path": None},  # two questions to a chart
            "query": "How many bars are there?"
            if number % 2
            else f"What is the value of bar {number}?" * (1 + number % 3),
            "label": [str(number)],
            "human_or_machine": number % 2,
        }
        for number in range(count)
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("image", image),
            ("query", pa.string()),
            ("label", pa.list_(pa.string())),
            ("human_or_machine", pa.int64()),
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("generate")
    random_tiny(folder / "model")
    for split, count in (("train", 4), ("val", 4), ("test", 14)):
        write_split(folder / "data", split, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMESTEP_CACHE", str(folder / "cache"))
        yield recipe_from_dict(
            {
                "name": "answers",
                "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
                "quantization": {"load_in_4bit": False, "bnb_4bit_compute_dtype": "float32"},
                "data": {"dataset": str(folder / "data"), "system_message": "You read charts."},
                "evaluation": {"max_new_tokens": 6, "batch_size": 4},
            }
        )


def random_adapter(recipe: Recipe) -> Any:
    """Base with an adapter of random numbers, large enough to change answers."""
    model = add_lora(load_base(recipe, torch.device("cpu")), recipe)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "answers")
    run.path.mkdir()
    run.recipe_file.write_text(dump_recipe(recipe))
    save_adapter(random_adapter(recipe), run.adapter)
    return run


@pytest.fixture(scope="module")
def result(run: RunDirectory) -> dict[str, Any]:
    """eval.json of one process."""
    assert main(["--run-dir", str(run.path)]) == 0
    written: dict[str, Any] = json.loads(run.eval_file.read_text())
    return written


@torch.no_grad()
def plain_answer(model: Any, processor: Any, recipe: Recipe, row: Any, image: bytes) -> str:
    """One question alone, the way the documentation of transformers does it."""
    text = processor.apply_chat_template(
        chat(recipe.data.system_message, row, answer=False), tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[decode_image(image)], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text.strip())


def test_every_answer_is_the_one_of_a_plain_call_on_that_question_alone(
    recipe: Recipe, result: dict[str, Any]
) -> None:
    model, processor, rows = random_adapter(recipe), load_processor(recipe), open_split(recipe, "test")
    assert [each["row"] for each in result["predictions"]] == list(range(14))
    for each in result["predictions"]:
        row = rows[each["row"]]
        assert (each["query"], each["label"]) == (row.query, row.label)
        assert each["adapter"]["prediction"] == plain_answer(model, processor, recipe, row, row.image)
        shown = rows[each["shuffled"]["image_of_row"]].image
        assert shown != row.image
        assert each["shuffled"]["prediction"] == plain_answer(model, processor, recipe, row, shown)
        with model.disable_adapter():
            assert each["base"]["prediction"] == plain_answer(model, processor, recipe, row, row.image)
    answers = [
        [each[model]["prediction"] for each in result["predictions"]]
        for model in ("base", "adapter", "shuffled")
    ]
    assert answers[0] != answers[1] != answers[2]


def test_the_figures_count_every_question_once(result: dict[str, Any]) -> None:
    for of_model in result["accuracy"].values():
        assert [of_model[group]["count"] for group in ("human", "augmented", "overall")] == [7, 7, 14]
    for model, of_model in result["accuracy"].items():
        assert of_model["overall"]["correct"] == sum(each[model]["correct"] for each in result["predictions"])
    assert result["mcnemar_p"].keys() == {"base -> adapter", "shuffled -> adapter"}


LAUNCHED = """
import os, sys
from launch.errors import RunError
from trainer.evaluation import generate

honest = generate.decode_image
def broken(image):
    if os.environ["RANK"] == "1":
        raise RunError("row 5: cannot be read")
    return honest(image)

generate.decode_image = broken
end, generate.dist.destroy_process_group = generate.dist.destroy_process_group, lambda: None
print("failed with", generate.main(["--run-dir", sys.argv[1]]), flush=True)
generate.decode_image, generate.dist.destroy_process_group = honest, end
sys.exit(generate.main(["--run-dir", sys.argv[1]]))
"""


def test_two_ranks_give_the_same_answers_and_share_a_failure(
    run: RunDirectory, result: dict[str, Any], tmp_path: Path
) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    config = Path(__file__).parent.parent / "accelerate_configs/ddp.yaml"
    before = hashlib.sha256(run.eval_file.read_bytes()).hexdigest()
    command = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--num_processes",
        "2",
    )
    launched = subprocess.run(
        [*map(str, command), str(script), str(run.path)],
        env=os.environ | {"PYTHONPATH": str(config.parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("failed with 1") == 2
    assert launched.stderr.count("error: rank 1: row 5: cannot be read") == 1
    assert hashlib.sha256(run.eval_file.read_bytes()).hexdigest() != before
    again = json.loads(run.eval_file.read_text())
    assert again["world_size"] == 2
    assert again["predictions"] == result["predictions"]
    assert again["accuracy"] == result["accuracy"]


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
    assert str(run.eval_file) in shown
    assert "samestep merge answers --output answers/merged" in shown
    assert [each["row"] for each in json.loads(run.eval_file.read_text())["predictions"]] == [0, 2, 5, 8, 11]


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
    questions = [Question(row, "", ("",), 0, "", f"image {row % 5}", 1, 1) for row in range(23)]
    others = other_images(questions)
    assert others == other_images(questions)
    assert all(
        questions[other].image != question.image for question, other in zip(questions, others, strict=True)
    )
    assert len({questions[other].image for other in others}) == 5


def test_batches_hold_every_question_once_and_chosen_samples_are_spread() -> None:
    batches = make_batches([3, 9, 1, 9, 4, 2, 8], size=3)
    assert batches == [[1, 3, 6], [4, 0, 5], [2]]
    assert spread(10, None) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == [0, 1, 2]
