"""`samestep ask`: images, then a question; what is not there is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.errors import ConfigError
from launch.local import ask_by_hand
from tests.helpers.launcher import Launcher, flag, samestep, stand_in, write_adapter

EMBEDDED = ["embedded", "--set", "batch.global_batch_size=32", "--set", "training.max_steps=6"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return stand_in(monkeypatch, tmp_path)


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch, launcher: Launcher) -> list[list[str]]:
    """What the command goes on as. There is a run, and two images."""
    samestep("run", *EMBEDDED)
    write_adapter(Path("runs/embedded/adapter"))
    for name in ("left.png", "right.jpg"):
        Path(name).touch()
    found: list[list[str]] = []

    def take(module: str, arguments: Any) -> None:
        found.append([module, *arguments])

    monkeypatch.setattr(ask_by_hand, "become_module", take)
    return found


def test_the_adapter_is_asked_about_all_images_together(became: list[list[str]]) -> None:
    assert samestep("ask", "embedded", "left.png", "right.jpg", "Which one grows?") == 0
    (command,) = became
    assert command[0] == "trainer.evaluation.ask"
    assert flag(command, "--models") == "adapter"
    assert [command[place + 1] for place, word in enumerate(command) if word == "--image"] == [
        "left.png",
        "right.jpg",
    ]
    assert command[-1] == "--question=Which one grows?"
    assert samestep("ask", "embedded", "left.png", "--models", "base,adapter", "--prompt", "none") == 0
    assert flag(became[-1], "--models") == "base-no-prompt,adapter-no-prompt"
    assert not any(word.startswith("--question") for word in became[-1])  # from the standard input


def test_a_recipe_without_a_run_answers_as_its_base(became: list[list[str]]) -> None:
    assert samestep("ask", "notebook", "left.png", "Why?") == 0
    assert flag(became[-1], "--models") == "base"
    assert Path(flag(became[-1], "--recipe")).name == "notebook.yaml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["left.png", "lost.png", "Why?"], "IMAGE: no image file (lost.png)"),
        (["Why?", "left.png"], "IMAGE: no image file (Why?)"),
        (["left.png", "Why?", "How?"], "IMAGE: no image file (Why?)"),
        (["Why?"], "IMAGE: missing before the question 'Why?'"),
        (["left.png", ""], "QUESTION: '' says nothing"),
        (["left.png", "Why?", "--models", "shuffled"], "shuffled needs the other images"),
        (["left.png", "Why?", "--models", "merged"], "no merged model yet"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    words: list[str], said: str, became: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("ask", "embedded", *words) == 2
    assert said in capsys.readouterr().err
    assert became == []


def test_a_long_question_is_no_file() -> None:
    with pytest.raises(ConfigError, match="IMAGE: missing"):
        ask_by_hand.split_words(["x" * 5000])


def test_the_page_shows_the_base_beside_what_was_trained_on_it(
    became: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ask_by_hand, "find_spec", lambda _: object())
    assert samestep("demo", "embedded") == 0
    assert became[-1][0] == "trainer.evaluation.demo"
    assert flag(became[-1], "--models") == "base,adapter"
    assert samestep("demo", "embedded", "--models", "best") == 2
    assert "no best adapter" in capsys.readouterr().err
    monkeypatch.setattr(ask_by_hand, "find_spec", lambda _: None)
    assert samestep("demo", "embedded") == 2
    assert "gradio: is not installed" in capsys.readouterr().err
    assert len(became) == 1
