"""Ask models about images by hand; the words appear as they come.

    python -m trainer.evaluation.ask --run-dir RUN --image chart.png [--question "How many bars?"]

Without a question, one is read from every line of the standard input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from transformers import TextStreamer

from launch.errors import ConfigError, SamestepError
from launch.option_values import add_option, place
from launch.run.evaluation_target import missing_models
from launch.untrusted_files import printable
from trainer.evaluation.command_line import add_request_arguments, request_of
from trainer.evaluation.panel import Panel, read_image, seat
from trainer.evaluation.request import EvaluationRequest
from trainer.logging_setup import print_error, setup_logging


class PrintableStreamer(TextStreamer):
    """Writes words as they are whole; no terminal obeys what a model says."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the words so far; called by transformers' `TextStreamer`."""
        sys.stdout.write(printable(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


def check_hand_request(request: EvaluationRequest) -> None:
    """Raise ConfigError for what cannot be asked by hand, or is not there."""
    problems = missing_models(request.run, request.models, request.checkpoint, request.adapter_folder)
    if any(model.startswith("shuffled") for model in request.models):
        problems.append("--models: shuffled needs the other images of a split; leave it out")
    if problems:
        raise ConfigError(problems)


def converse(panel: Panel, images: Sequence[Image.Image], questions: Iterator[str]) -> None:
    """Put every question to everyone, one after the other.

    Raises:
        ConfigError: a question that cannot be asked.
    """
    width = max(len(respondent.name) for respondent in panel.respondents)
    for question in questions:
        panel.refuse_question(question)
        for respondent in panel.respondents:
            if len(panel.respondents) > 1:
                sys.stdout.write(f"{respondent.name:{width}}  ")
                sys.stdout.flush()
            streamer = PrintableStreamer(
                panel.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
            panel.answer(respondent, images, question, streamer)


def questions_of(question: str | None) -> Iterator[str]:
    """Yield the question that was given, or every line of the standard input that says something."""
    if question is not None:
        yield question
        return
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("question (Ctrl-D ends): ")
            sys.stderr.flush()
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluation.ask",
        description="Ask models about images.",
        epilog="example: python -m trainer.evaluation.ask --run-dir runs/embedded --image chart.png --question Why?",
    )
    add_request_arguments(parser, "adapter")
    add_option(parser, "--image", place, action="append", required=True, help="an image; may be repeated")
    parser.add_argument("--question", help="the question (default: every line of the standard input)")
    options = parser.parse_args(arguments)
    setup_logging()
    console = Console(stderr=True)
    try:
        request = request_of(options)
        images = [read_image(Path(file)) for file in options.image]
        check_hand_request(request)
        with console.status("loading") as status:  # says nothing where nobody watches
            panel = seat(request, request.recipe(), lambda name: status.update(f"loading {printable(name)}"))
        converse(panel, images, questions_of(options.question))
    except SamestepError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
