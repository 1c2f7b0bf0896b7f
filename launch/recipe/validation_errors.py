"""pydantic's findings as lines a user can act on: `<key>: <what is wrong> (<value>); <what to do>`."""

import difflib
import json
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Union, get_origin

from pydantic import BaseModel, ValidationError

Root = type[BaseModel]
_SHOWN = 80  # characters of a value or a key
_MOST = 100  # problems


def validation_errors(
    error: ValidationError, root: Root, refusals: Mapping[str, str], whole: str = "a recipe"
) -> list[str]:
    """One line per key. `refusals`: key that is refused by name -> reason, with what to do; dotted, or in any section.

    `whole`: what `root` describes.

    The lines of a ValueError raised by a validator of `root` itself are taken as they are.
    """
    lines: dict[str, str] = {}
    details = error.errors(include_url=False)
    for detail in details[:_MOST]:
        if not detail["loc"] and "ctx" in detail:
            lines.update((line, line) for line in str(detail["ctx"]["error"]).splitlines())
            continue
        key, known = _key_of(root, detail["loc"])
        if not known:
            lines[key] = _unknown_key(root, key, refusals, whole)
        else:
            lines.setdefault(key, _wrong_value(root, key, detail["type"], detail["msg"], detail["input"]))
    more = [f"{whole}: has {len(details) - _MOST:,} more problems"] if len(details) > _MOST else []
    return [*lines.values(), *more]


def _key_of(root: Root, loc: tuple[int | str, ...]) -> tuple[str, bool]:
    """Dotted key of a pydantic location, without union members; and whether there is such a key."""
    keys: list[str] = []
    section: Root | None = root
    for part in loc:
        if section is None:
            break
        keys.append(_cut(str(part)))
        field = section.model_fields.get(str(part))
        if field is None:
            return ".".join(keys), False
        section = _section_type(field.annotation)
    return ".".join(keys), True


def _wrong_value(root: Root, key: str, kind: str, message: str, value: object) -> str:
    fields = _fields(root)
    annotation, description = fields[key]
    if kind == "missing":
        return f"{key}: missing; give {description}"
    shown = _cut("".join(_pieces(value)))
    what = f"{message[0].lower()}{message[1:]}".replace("input should be", "must be")
    what = what.replace("input should match", "must match")
    if get_origin(annotation) in (Union, types.UnionType):  # pydantic names each member's complaint
        what = "not a valid value"
    if _section_type(annotation):
        what = "must be a section"
    return f"{key}: {what} (got {shown}); give {description}"


def _pieces(value: object) -> Iterator[str]:
    """JSON of a value, no further than it will be shown: it may be endless, or contain itself."""
    length = 0
    with suppress(ValueError):
        for piece in json.JSONEncoder(default=str, ensure_ascii=False).iterencode(value):
            yield piece
            length += len(piece)
            if length > _SHOWN:
                return


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _unknown_key(root: Root, key: str, refusals: Mapping[str, str], whole: str) -> str:
    section, _, last = key.rpartition(".")
    reason = refusals.get(key) or refusals.get(last, "")
    if reason and reason != f"set it in the section {section}":
        return f"{key}: refused; {reason}"
    keys = list(_fields(root))
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    everywhere = {k.rpartition(".")[2]: k for k in reversed(keys)}
    # Of another section only what is nearly the same word, where the section that was named has keys of its own.
    inside = section in root.model_fields
    for candidates, likeness in ((siblings, 0.5 if inside else 0.6), (everywhere, 0.8 if inside else 0.6)):
        if near := difflib.get_close_matches(last, list(candidates), n=1, cutoff=likeness):
            return f"{key}: unknown key; did you mean {candidates[near[0]]}?"
    return f"{key}: unknown key; {section or whole} has {', '.join(siblings)}"


def _fields(root: Root) -> dict[str, tuple[Any, str]]:
    """Map every dotted key, sections included, to its type and what to give for it."""
    fields: dict[str, tuple[Any, str]] = {}
    for name, field in root.model_fields.items():
        section = _section_type(field.annotation)
        inside = f"a section with {', '.join(section.model_fields)}" if section else ""
        fields[name] = (field.annotation, field.description or inside)
        if section:
            for key, inner in section.model_fields.items():
                fields[f"{name}.{key}"] = (inner.annotation, inner.description or "a valid value")
    return fields


def _section_type(annotation: Any) -> Root | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
