"""The page: served on loopback, it answers what `samestep ask` answers, with examples of the test split."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from PIL import Image

from launch.errors import ConfigError, RunError
from launch.recipe.loading import recipe_from_dict
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from tests.helpers.adapters import write_run
from trainer.evaluation import demo
from trainer.evaluation.panel import Panel, read_image, seat
from trainer.evaluation.request import EvaluationRequest


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    values = recipe_values(world)
    values["evaluation"] |= {"max_new_tokens": 6}
    return write_run(recipe_from_dict(values), tmp_path_factory.mktemp("demo") / "run")


@pytest.fixture(scope="module")
def panel(run: RunDirectory) -> Panel:
    request = EvaluationRequest(run, "test", ("base", "adapter"), None)
    return seat(request, request.recipe())


@pytest.fixture(scope="module")
def examples(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    return demo.examples_of(
        EvaluationRequest(run, "test", ("base",), None).recipe(), tmp_path_factory.mktemp("examples")
    )


@pytest.fixture(scope="module")
def address(panel: Panel, examples: list[list[str]]) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        blocks = demo.page(panel, "run", examples)
        _, address, _ = blocks.launch(
            server_name=demo.HOST,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[str(Path(examples[0][0]).parent)],
        )
        yield address
        blocks.close()


def test_an_image_that_the_processor_would_not_take_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    with pytest.raises(
        ConfigError, match=r"IMAGE: .*thin.png: the aspect ratio is above 200 \(1 x 300 pixels\)"
    ):
        read_image(tmp_path / "thin.png")


def test_the_page_answers_with_base_and_adapter_beside_each_other(
    address: str, panel: Panel, examples: list[list[str]]
) -> None:
    assert address.startswith("http://127.0.0.1:")
    client = Client(address, verbose=False)
    file, question, target = examples[1]
    job = client.submit(handle_file(file), question, api_name="/ask")
    answers = job.result()
    expected = [panel.answer(each, [read_image(Path(file))], question) for each in panel.respondents]
    assert list(answers) == expected
    assert expected[0] != expected[1]
    so_far = [tuple(each) for each in job.outputs()]
    for number, answer in enumerate(expected):  # word by word, the second when the first is whole
        growing = list(dict.fromkeys(each[number] for each in so_far if each[number] != "..."))
        assert len(growing) > 1
        assert all(answer.startswith(part) for part in growing)
    assert all(first == expected[0] for first, second in so_far if second != "...")
    shown = str(client.config)
    assert "base" in shown
    assert "adapter" in shown
    assert question in shown
    assert target


def test_what_cannot_be_asked_is_said_on_the_page(address: str, examples: list[list[str]]) -> None:
    client = Client(address, verbose=False)
    with pytest.raises(Exception, match="QUESTION: is empty"):
        client.predict(handle_file(examples[0][0]), " ", api_name="/ask")
    with pytest.raises(Exception, match="IMAGE: is missing"):
        client.predict(None, "How high?", api_name="/ask")


def test_an_answer_that_fails_ends_the_words_with_its_reason(
    panel: Panel, examples: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise RunError("the GPU is out of memory")

    monkeypatch.setattr(Panel, "answer", full)
    with pytest.raises(RunError, match="out of memory"):
        list(demo.answers_of(panel, examples[0][0], "How high?"))


def test_without_gradio_the_command_says_what_to_install(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)

    def not_loaded(*_: Any) -> None:
        raise AssertionError("a model is loaded before")

    monkeypatch.setattr(demo, "seat", not_loaded)
    assert demo.main(["--run-dir", str(run.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'samestep[demo]'" in line
