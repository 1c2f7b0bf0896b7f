"""Questions by hand, on the terminal or on a page: what is asked is found here, the trainer's side answers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from launch.errors import ConfigError
from launch.option_values import line_of_text, place
from launch.run.evaluation_target import Target, find_target, missing_models
from launch.run.variants import parse_variant, prompt_option, with_prompt
from launch.subprocesses import become_module

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def model_flags(
    name: str, runs_dir: Path, recipe: str | None, models: str | None, prompt: str, beside_base: bool = False
) -> list[str]:
    """The command line that says who is asked: the adapter where nobody says, `beside_base` with its base.

    Raises:
        ConfigError: something that is asked for is not there.
    """
    target = find_target(name, runs_dir, recipe)
    suffix, message = prompt_option(prompt)
    model_names = with_prompt(models.split(",") if models else _models(target, beside_base), suffix)
    problems = missing_models(target.run, model_names, target.checkpoint, target.adapter)
    if any(parse_variant(model).weights == "shuffled" for model in model_names):
        problems.append("--models: shuffled needs the other images of a split; leave it out")
    if problems:
        raise ConfigError(problems)
    return [
        *target.flags(),
        "--models",
        ",".join(model_names),
        *(["--prompt-file", str(message)] if message else []),
    ]


def _models(target: Target, beside_base: bool) -> list[str]:
    """The base and what was trained on it, or the latter alone."""
    models = [model for model in target.models if model != "shuffled"]
    return models if beside_base else models[-1:]


def start_ask(flags_of_models: Sequence[str], words: Sequence[str]) -> None:
    """Go on as the process that answers. `words`: images, and a question or none.

    Raises:
        ConfigError: an image is not there, or two words are questions.
    """
    images, question = split_words(words)
    flags = [word for image in images for word in ("--image", str(image))]
    become_module(
        "trainer.evaluation.ask",
        [*flags_of_models, *flags, *([] if question is None else [f"--question={question}"])],
    )


def start_demo(flags: Sequence[str]) -> None:
    """Go on as the process that serves the page. ConfigError without gradio."""
    if find_spec("gradio") is None:
        raise ConfigError(
            "gradio: is not installed, and the page needs it; run `pip install 'samestep[demo]'`"
        )
    become_module("trainer.evaluation.demo", flags)


def split_words(words: Sequence[str]) -> tuple[list[Path], str | None]:
    """Images, and the question: the last word, where it names no file. ConfigError."""
    *others, last = words
    is_image = Path(last).suffix.lower() in IMAGES or _is_file(last)
    named, question = (
        (words, None)
        if is_image
        else (others, line_of_text("QUESTION", last, "ask something, or leave it out"))
    )
    if not named:
        raise ConfigError(
            f"IMAGE: missing before the question {last[:60]!a}; give the file of an image first"
        )
    images = [place("IMAGE")(word) for word in named]
    if missing := [image for image in images if not image.is_file()]:
        raise ConfigError(
            f"IMAGE: no image file ({', '.join(map(str, missing[:3]))}); give files of images first, then one question "
            "in quotes"
        )
    return images, question


def _is_file(word: str) -> bool:
    try:
        return Path(word).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, say
        return False
