"""Questions by hand: the answers are those of plain calls, they appear as they come, and what cannot be is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.untrusted_files import printable
from tests.conftest import chart_png, recipe_values
from tests.helpers.adapters import random_adapter, write_run
from trainer.data.images import decode_image
from trainer.evaluation import ask
from trainer.evaluation.ask import main
from trainer.pretrained import load_processor


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["evaluation"] |= {"max_new_tokens": 6}
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = write_run(recipe, tmp_path_factory.mktemp("ask") / "run")
    for seed in (1, 2):
        (run.path.parent / f"{seed}.png").write_bytes(chart_png(seed))
    return run


def images(run: RunDirectory, *seeds: int) -> list[str]:
    return [word for seed in seeds for word in ("--image", str(run.path.parent / f"{seed}.png"))]


@torch.no_grad()
def plain_answer(model: Any, recipe: Recipe, run: RunDirectory, question: str, *seeds: int) -> str:
    """As the documentation of transformers has it."""
    processor = load_processor(recipe)
    content = [*({"type": "image"} for _ in seeds), {"type": "text", "text": question}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": recipe.data.system_message}]},
        {"role": "user", "content": content},
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [decode_image((run.path.parent / f"{seed}.png").read_bytes()) for seed in seeds]
    inputs = processor(text=[text], images=pictures, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_base_and_adapter_answer_side_by_side_as_plain_calls_do(
    recipe: Recipe, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_adapter(recipe)
    asked = ["--run-dir", str(run.path), "--models", "base,adapter", "--question", "How high?"]
    assert main([*asked, *images(run, 1, 2)]) == 0
    shown = capsys.readouterr().out.splitlines()
    adapter = plain_answer(model, recipe, run, "How high?", 1, 2)
    with model.disable_adapter():
        base = plain_answer(model, recipe, run, "How high?", 1, 2)
    assert base != adapter
    said = [line.partition("  ") for line in shown]
    assert [(name.strip(), answer.strip()) for name, _, answer in said] == [
        ("base", printable(base)),
        ("adapter", printable(adapter)),
    ]


def test_every_line_of_the_standard_input_is_a_question(
    recipe: Recipe, run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("How high?\n\n  Which one?\n"))
    assert main(["--run-dir", str(run.path), *images(run, 1)]) == 0
    shown = capsys.readouterr().out.splitlines()
    model = random_adapter(recipe)
    expected = [plain_answer(model, recipe, run, question, 1) for question in ("How high?", "Which one?")]
    assert [line.strip() for line in shown] == [printable(answer) for answer in expected]


def test_words_appear_as_they_come_and_no_terminal_obeys_them(run: RunDirectory, recipe: Recipe) -> None:
    streamer = ask.PrintableStreamer(load_processor(recipe).tokenizer, skip_prompt=True)
    pieces: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", type("Out", (), {"write": pieces.append, "flush": lambda self: None})())
        streamer.on_finalized_text("\x1b[31mred ")
        streamer.on_finalized_text("bar", stream_end=True)
    assert pieces[1] == "bar\n"
    assert "\x1b" not in pieces[0]
    assert "red" in pieces[0]


def test_a_ctrl_c_ends_it_without_a_traceback(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "seat", interrupted)
    assert main(["--run-dir", str(run.path), *images(run, 1), "--question", "?"]) == 130


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--question", "a <|im_end|> b"], "QUESTION: holds the special token <|im_end|>"),
        (["--question", " "], "QUESTION: is empty"),
        (["--image", "{run}/recipe.yaml", "--question", "?"], "recipe.yaml: the image is in no format"),
        (["--image", "{run}/nothing.png", "--question", "?"], "nothing.png cannot be read"),
        (["--models", "shuffled", "--question", "?"], "shuffled needs the other images"),
        (["--models", "checkpoint-9", "--question", "?"], "has no checkpoint-9 (there are: none)"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(
    words: list[str], said: str, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("{run}", str(run.path)) for word in words]
    assert main(["--run-dir", str(run.path), *images(run, 1), *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
