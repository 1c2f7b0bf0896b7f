"""A page on this machine: an image and a question, base and tuned model beside each other, examples of the test split.

    python -m trainer.evaluation.demo --run-dir RUN [--models base,adapter]

Reached on loopback alone; nothing is shared, sent or kept. Needs gradio, which is not installed by default.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from transformers import TextIteratorStreamer

from launch.console import echo
from launch.errors import ConfigError, SamestepError
from launch.recipe.schema import Recipe
from launch.untrusted_files import printable
from trainer.data.images import decode_image
from trainer.data.row_errors import RowError
from trainer.data.splits import open_split
from trainer.evaluation.ask import check_hand_request
from trainer.evaluation.command_line import add_request_arguments, request_of
from trainer.evaluation.panel import Panel, Respondent, read_image, seat
from trainer.evaluation.questions import evenly_spaced
from trainer.logging_setup import print_error, setup_logging

EXAMPLES = 6
HOST = "127.0.0.1"
_MISSING = "gradio: is not installed, and the page needs it; run `pip install 'samestep[demo]'`"


def answers_of(panel: Panel, file: str | None, question: str | None) -> Iterator[list[str]]:
    """Yield the answers so far, one for each model, as they come. ConfigError for what cannot be asked."""
    if not file:
        raise ConfigError("IMAGE: is missing; choose one, or an example")
    panel.refuse_question(question or "")
    image = read_image(Path(file))
    answers = ["..."] * len(panel.respondents)
    yield [*answers]
    for number, respondent in enumerate(panel.respondents):
        for answers[number] in growing_answer(panel, respondent, image, question or ""):
            yield [*answers]


def growing_answer(panel: Panel, respondent: Respondent, image: Image.Image, question: str) -> Iterator[str]:
    """Yield the answer of one so far whenever a word of it is whole, and the whole answer last."""
    streamer = TextIteratorStreamer(panel.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(panel.answer, respondent, [image], question, streamer)
        # Also where it failed, or the page would wait for words.
        answer.add_done_callback(lambda _: streamer.end())
        text = ""
        for words in streamer:
            text += words
            yield text.strip()
        yield answer.result()


def examples_of(recipe: Recipe, folder: Path, count: int = EXAMPLES) -> list[list[str]]:
    """Return (image file, question, target) of rows with one image, spread over the test split."""
    rows, examples = open_split(recipe, "test"), []
    for number in evenly_spaced(len(rows), count):
        row = rows[number]
        file = folder / f"row-{number}.png"
        if len(row.images) != 1:
            continue  # the page takes one image
        try:
            decode_image(row.images[0]).save(file)
        except RowError:
            continue  # `prepare` names such rows
        examples.append([str(file), row.query, row.label[0]])
    return examples


def page(panel: Panel, title: str, examples: Sequence[Sequence[str]]) -> Any:
    """Build the page as gradio's `Blocks`, with one function, `/ask`."""
    import gradio

    def ask(file: str | None, question: str | None) -> Iterator[list[str] | str]:
        try:
            for answers in answers_of(panel, file, question):
                yield answers if len(answers) > 1 else answers[0]
        except SamestepError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title=title, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            image = gradio.Image(type="filepath", label="chart", sources=["upload", "clipboard"])
            with gradio.Column():
                question = gradio.Textbox(label="question", lines=2)
                button = gradio.Button("Ask", variant="primary")
                target = gradio.Textbox(label="target of the example", interactive=False)
        with gradio.Row():
            outputs = [gradio.Textbox(label=each.name, interactive=False) for each in panel.respondents]
        if examples:
            gradio.Examples(
                [list(example) for example in examples], [image, question, target], label="of the test split"
            )
        for event in (button.click, question.submit):
            event(ask, [image, question], outputs, api_name="ask", concurrency_limit=1)
        image.clear(lambda: "", None, target, api_visibility="private")
    return blocks


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status. Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.demo",
        description="A page on this machine that asks models about images.",
        epilog="example: python -m trainer.evaluation.demo --run-dir runs/embedded",
    )
    add_request_arguments(parser, "base,adapter")
    options = parser.parse_args(arguments)
    setup_logging()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        request = request_of(options)
        check_hand_request(request)
        try:
            import gradio  # noqa: F401 - before a model is loaded
        except ImportError:
            raise ConfigError(_MISSING) from None
        recipe = request.recipe()
        panel = seat(request, recipe)
        with TemporaryDirectory() as folder:
            blocks = page(panel, request.run.name, examples_of(recipe, Path(folder)))
            _, address, _ = blocks.launch(
                server_name=HOST, share=False, quiet=True, prevent_thread_lock=True, allowed_paths=[folder]
            )
            echo(f"{printable(address)}  (Ctrl-C ends it)")
            blocks.block_thread()
    except SamestepError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
