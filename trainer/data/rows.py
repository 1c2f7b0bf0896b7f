"""One row of any data set, as everything after the formats sees it: images, turns of a chat, accepted answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.inputs.dataset_index import row_digest

IMAGE = None
"""In the content of a turn: the place of the row's next image."""
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message of a chat. `content`: texts, and `IMAGE` where an image stands."""

    role: Role
    content: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Return the words of the turn, without its images."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True)
class Row:
    """One sample of a data set, not yet encoded.

    `images`: the bytes of the encoded files, undecoded, in the order of the chat. `turns`: an optional system message,
    then user and assistant in turn, the assistant last. `label`: the accepted answers; the first one is the text of the
    last turn. `human_or_machine`: ChartQA's kind of question (0: of a person, 1: of a machine), None: not known.
    `turn_names`: what a chat's turns are called where one is wrong, as the file counts and calls them.
    """

    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    label: list[str]
    human_or_machine: int | None = None
    turn_names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def query(self) -> str:
        """Return the words of the last question."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def digest(self) -> bytes:
        """Return the sha256 of the content, of which the data set's fingerprint is made.

        A row of one image and one question is digested as ChartQA's rows always were, whatever format it came in.
        """
        if self._is_one_question:
            return row_digest(self.images[0], self.query, self.label)
        turns = [[turn.role, list(turn.content)] for turn in self.turns]
        images = [hashlib.sha256(image).hexdigest() for image in self.images]
        content = json.dumps(["chat", images, turns, self.label], ensure_ascii=True)
        return hashlib.sha256(content.encode()).digest()

    @property
    def images_digest(self) -> str:
        """Return the sha256 (hexadecimal) of its images; of a single one, of the file."""
        digests = [hashlib.sha256(image).hexdigest() for image in self.images]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def _is_one_question(self) -> bool:
        if len(self.images) != 1 or [turn.role for turn in self.turns] != ["user", "assistant"]:
            return False
        return self.turns[0].content == (IMAGE, self.query) and self.turns[1].content == (self.label[0],)


def question_row(
    images: Sequence[bytes], query: str, label: Sequence[str], human_or_machine: int | None = None
) -> Row:
    """Make a row of one question about some images, which stand before it."""
    question = Turn("user", (*[IMAGE] * len(images), query))
    return Row(tuple(images), (question, Turn("assistant", (label[0],))), list(label), human_or_machine)


def chat(system_message: str | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the turns as messages for `processor.apply_chat_template`; a system message of their own wins over the
    recipe's.
    """
    own = bool(turns) and turns[0].role == "system"
    begin = [] if own or system_message is None else [Turn("system", (system_message,))]
    return [{"role": turn.role, "content": list(_parts(turn.content))} for turn in (*begin, *turns)]


def _parts(content: Sequence[str | None]) -> Iterator[dict[str, str]]:
    for part in content:
        yield {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
