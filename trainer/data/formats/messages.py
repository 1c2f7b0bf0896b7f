"""Chats as trl and ms-swift take them: `messages` with roles and contents, and `images` beside them or within.

Chats of ShareGPT and LLaVA, too: `conversations` with `from` and `value`, whose speakers are human and gpt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.data.formats.images import ImageFiles
from trainer.data.row_errors import RowError, describe_value
from trainer.data.rows import IMAGE, Row, Turn

TAG = "<image>"
"""Where an image stands in a text (ms-swift, LLaVA)."""
CHATS = ("messages", "conversations")
"""Names of the column that holds a chat, the first one that is there counts."""
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_UNREAD = ("videos", "video", "audios", "audio", "tools", "rejected", "rejected_response")
READ = (*CHATS, "images", "image", "system", *_UNREAD)
"""The columns that are looked at."""
_NONE: tuple[Any, ...] = (None, "", "[]", [], {}, 0, False)  # ms-swift writes an empty list of tools as text
_OF_LOSS = ("weight", "loss", "train", "training")
"""Keys by which other programs leave a message out of the loss (OpenAI's, ms-swift's, axolotl's)."""
_ROLES = ("system", "user", "assistant")
_IMAGE_KEYS = ("image", "path", "bytes", "url", "image_url")


def messages_row(raw: Mapping[str, Any], files: ImageFiles, trains_questions: bool = False) -> Row:
    """Return the chat of a row; RowError says why it is none.

    An image stands where a content has a part of type image or a text has `<image>`; where no place is marked, all
    images stand before the first question, as trl 1.16 puts them. `trains_questions`: the loss is over every token.
    """
    name = next((name for name in CHATS if raw.get(name) is not None), CHATS[0])
    messages = raw.get(name)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RowError(f"{name} is {describe_value(messages)}, not a list of messages")
    if unread := next((column for column in _UNREAD if raw.get(column) not in _NONE), None):
        raise RowError(f"{unread} beside the chat is not trained here; take it out of the row")
    words = _file_words(messages)
    places_of = [f"message {number}" for number in range(len(messages))]
    if system := raw.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
        places_of.insert(0, "the column system")
    images = list(files.read_all(raw["images"] if raw.get("images") is not None else raw.get("image")))
    inline: list[bytes] = []
    turns = [
        _turn(place, message, words, files, inline, trains_questions)
        for place, message in zip(places_of, messages, strict=True)
    ]
    places = sum(part is IMAGE for turn in turns for part in turn.content)
    if inline and (images or len(inline) != places):
        raise RowError("some images are within the messages and others beside them; give all in one place")
    images = inline or images
    if images and not places:
        turns, places = _before_first_question(turns, len(images)), len(images)
    if places != len(images):
        raise RowError(f"the messages have places for {places} images, the row has {len(images)}")
    _check_order(turns, places_of, words)
    return Row(tuple(images), tuple(turns), [turns[-1].text])


def _file_words(messages: Sequence[Any]) -> Mapping[str, str]:
    """What a chat calls each role: ShareGPT's speakers, or those it names itself, where its messages are `from` one."""
    speakers = [
        message["from"]
        for message in messages
        if isinstance(message, Mapping) and _is_from_a_speaker(message)
    ]
    if not speakers:
        return {role: role for role in _ROLES}
    own = {_SPEAKERS.get(speaker, speaker): speaker for speaker in speakers if isinstance(speaker, str)}
    return {"system": "system", **{role: speaker for speaker, role in _SPEAKERS.items()}, **own}


def _is_from_a_speaker(message: Mapping[str, Any]) -> bool:
    return message.get("role") is None and message.get("content") is None and "from" in message


def _turn(
    place: str,
    message: object,
    words: Mapping[str, str],
    files: ImageFiles,
    inline: list[bytes],
    trains_questions: bool,
) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(f"{place} is {describe_value(message)}, not a role and a content")
    role, content, key, key_of_role = message.get("role"), message.get("content"), "content", "role"
    if _is_from_a_speaker(message):
        role, content, key, key_of_role = message["from"], message.get("value"), "value", "speaker"
        role = _SPEAKERS.get(str(role), role)
    if role not in _ROLES:
        raise RowError(
            f"{place} has the {key_of_role} {repr(role)[:40]}, not {', '.join(words[role] for role in _ROLES)}"
        )
    heeded = (None, 1) if role == "assistant" or trains_questions else (None, 1, 0)
    if untrained := next((key for key in _OF_LOSS if message.get(key) not in heeded), None):
        raise RowError(
            f"{place} has {untrained} {describe_value(message[untrained])}, which is not heeded: "
            "data.loss says which answers are trained; take it out"
        )
    if message.get("tool_calls"):
        raise RowError(f"{place} calls tools, which are not trained here")
    parts = tuple(_parts(place, key, content, files, inline))
    if role != "user" and IMAGE in parts:
        raise RowError(
            f"{place} ({words[role]}) has an image; only questions of the {words['user']} may have some"
        )
    if not any(isinstance(part, str) and part.strip() for part in parts) and (
        role != "user" or IMAGE not in parts
    ):
        raise RowError(f"{place} ({words[role]}) is empty")
    if role == "assistant":
        parts = ("".join(part for part in parts if part is not None),)
    return Turn(role, parts)


def _parts(
    place: str, key: str, content: object, files: ImageFiles, inline: list[bytes]
) -> Iterator[str | None]:
    if isinstance(content, str):
        yield from _text_parts(content)
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RowError(f"the {key} of {place} is {describe_value(content)}, not text or parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(text := part.get("text"), str):
                raise RowError(f"a part of {place} has a text that is {describe_value(text)}")
            yield from _text_parts(text)
        elif kind in ("image", "image_url"):
            yield IMAGE
            image = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            if image is not None:
                inline.append(files.read(image))
        else:
            raise RowError(f"{place} has a part of type {repr(kind or part)[:40]}, not text or image")


def _text_parts(text: str) -> Iterator[str | None]:
    for place, words in enumerate(text.split(TAG)):
        if place:
            yield IMAGE
        if words:
            yield words


def _before_first_question(turns: list[Turn], images: int) -> list[Turn]:
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    question = Turn("user", (*[IMAGE] * images, *turns[first].content))
    return [*turns[:first], question, *turns[first + 1 :]]


def _check_order(turns: Sequence[Turn], places_of: Sequence[str], words: Mapping[str, str]) -> None:
    """An optional system message, then user and assistant in turn, the assistant last."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    first = len(turns) - len(spoken)
    for place, turn in enumerate(spoken):
        expected = "assistant" if place % 2 else "user"
        if turn.role != expected:
            raise RowError(
                f"{places_of[first + place]} is of {words[turn.role]}, where {words[expected]} is due"
            )
    if not spoken or spoken[-1].role != "assistant":
        raise RowError(f"the last message is not of the {words['assistant']}, so there is no answer to train")
