"""The chat template of a base model: a program of somebody else's, which is rendered for every row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from launch.errors import ConfigError
from launch.untrusted_files import printable
from trainer.sandbox import trial

_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where transformers 5 looks for it, the first one counts."""
_QUESTION, _ANSWER = "How high is it?", "3"
_IMPURE = re.compile(r"strftime_now|\|\s*random\b")
_CHARACTERS = 100_000
"""The most that it may make of a short conversation."""


def refuse_endless_template(processor: ProcessorMixin, place: Path, key: str = "model.name_or_path") -> None:
    """Render one short conversation, with and without its answer, within bounds of time, memory and length.

    It must write each text and each image once, the same every day, and the prompt must be how the answered
    conversation begins: else no answer could be told apart, or a row would be another one tomorrow.

    `place`: the folder or the file that the template is from, which `key` of a recipe names.

    Raises:
        ConfigError: the template cannot be rendered, or not within the bounds.
    """
    if problem := trial(lambda: _render(processor)):
        name = next((name for name in _FILES if (place / name).is_file()), _FILES[0])
        raise ConfigError(
            f"{key}: {place if place.is_file() else place / name}: the chat template cannot be used "
            f"({printable(problem)}); {'correct it' if place.is_file() else 'get the model again'}"
        )


def _render(processor: ProcessorMixin) -> None:
    question: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "Answer."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]},
    ]
    answered = [*question, {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}]
    texts = []
    for conversation, prompt in ((question, True), (answered, False)):
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
        if len(text) > _CHARACTERS:
            raise ValueError(f"it makes {len(text):,} characters of a conversation of three lines")
        texts.append(text)
    if impure := _IMPURE.search(str(processor.chat_template)):
        raise ValueError(f"it uses {impure[0]}, which makes other text of the same row every time")
    prompt_text, whole = texts
    if whole.count(processor.image_token) != 1:
        raise ValueError(
            f"it writes {processor.image_token} {whole.count(processor.image_token)} times for one image"
        )
    if not whole.startswith(prompt_text):
        raise ValueError(
            "an answered conversation does not begin with the prompt that it makes for generation"
        )
    if _QUESTION not in prompt_text or _ANSWER not in whole[len(prompt_text) :]:
        raise ValueError("it leaves out the question or the answer")
