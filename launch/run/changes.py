"""A run that goes on with something changed: refused with the values, or allowed by name with its consequence.

A key is a dotted recipe key, or a part of the run's identity (`launch.inputs.identity.PARTS`): other rows, weights or
processor settings behind the same name. `data.content` and `model.content` stand for all parts of data and model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.errors import ConfigError
from launch.inputs.identity import DATA_PARTS, MODEL_PARTS, OWN_TEMPLATE, PARTS, RunIdentity, short, what_is
from launch.recipe.fingerprint import LATER
from launch.untrusted_files import printable

CONTENT_KEYS = ("data.content", "model.content")
OTHER_RUN = "choose another --name, or --fresh to move the old run aside"

# Another dataset or base has another content: to allow one of these is to allow that too.
_MAKE_CONTENT: dict[str, tuple[str, ...]] = {
    **{
        part: ("data.content", "data.dataset", "data.revision", part.removesuffix(".rows"))
        for part in DATA_PARTS
    },
    **dict.fromkeys(MODEL_PARTS, ("model.content", "model.name_or_path", "model.revision")),
    OWN_TEMPLATE: ("data.chat_template",),
    "model.content": ("model.name_or_path", "model.revision"),  # of a run whose base has no parts recorded
}
_NEVER = {
    "lora.r": "the stored adapter has matrices of that rank",
    "lora.target_modules": "the stored adapter belongs to those modules",
    "lora.use_dora": "the stored adapter has lengths of rows, or has none",
    "lora.rank_pattern": "the stored adapter has matrices of those ranks",
    "lora.bias": "the stored adapter holds no biases",
}
_OTHER_END = (
    "the run ends later or sooner; the learning-rate schedule is computed for the new number of steps and entered at "
    "the step where the run is, so a rate that had decayed rises again"
)
_OTHER_VALIDATION = "the validation losses are of other rows from now on; what is trained stays the same"
_OTHER_TEST = "`samestep evaluate` asks other questions; what is trained stays the same"
_OTHER_ROUNDING = (
    "the products of the frozen layers are rounded in another way from now on; the loss may jump by 1 %"
)
_CONSEQUENCES: dict[str, str] = {
    "batch.global_batch_size": "the run goes on at the same place of the sample stream, nothing skipped or seen twice, "
    "with steps of the new size; the number of steps left and the learning-rate schedule follow",
    "batch.prefix_sharing": "the tokens that prompts begin with have other dropout masks from now on; the rest "
    "of the run differs by that and by rounding",
    "training.num_train_epochs": _OTHER_END,
    "training.max_steps": _OTHER_END,
    "training.seed": "the rest of the run sees the samples in another order: some a second time, some not at all, in "
    "the epoch under way; dropout masks are others",
    "lora.lora_alpha": "the adapter counts for more or less from now on, what was trained so far too; the loss jumps",
    "lora.use_rslora": "the adapter counts for more or less from now on, what was trained so far too; the loss jumps",
    "lora.alpha_pattern": "layers count for more or less from now on, what was trained so far too; the loss jumps",
    "data.loss": "the rest of the run counts the loss over other tokens; it cannot be compared with what was so far",
    "data.validation.rows": _OTHER_VALIDATION,
    "data.test.rows": _OTHER_TEST,
    "model.products": _OTHER_ROUNDING,
    "model.num_layers_at_start_in_bf16": _OTHER_ROUNDING,
    "model.processor": "the images become other numbers from now on; the loss may jump",
    "model.chat_template": "the questions are put in other words from now on; the loss may jump",
    OWN_TEMPLATE: "the questions are put in other words from now on; the loss may jump",
    "model.tokenizer": "the texts may become other tokens from now on; the loss may jump",
    "model.generation": "answers may end at other tokens; what is trained stays the same",
    "data.validation": _OTHER_VALIDATION,
    "data.test": _OTHER_TEST,
}
_BY_SECTION = {
    "data": "the rest of the run sees the new data, from the same place of its own stream on",
    "model": "the adapter goes on over other weights than it was trained on; the loss may jump",
    "quantization": "the adapter goes on over a base quantized in another way; the loss may jump",
}
_ANY_OTHER = "the rest of the run uses the new value; what was trained so far stays"
_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """One value that the run has and the request wants otherwise."""

    key: str
    old: object
    new: object

    def __str__(self) -> str:
        old, new = self.shown()
        if self.key in (*PARTS, *CONTENT_KEYS):
            return f"{self.key}: {self.comparison('the run has')}"
        return f"{self.key}: the run has {old}, the recipe {new}"

    def comparison(self, before: str) -> str:
        """Compare a part of the identity: what was found before, introduced by these words, and what is here."""
        old, new = self.shown()
        return f"{before} {old}, here it is {new} ({what_is(self.key)})"

    def shown(self) -> tuple[str, str]:
        """Both values in a few words; of long ones what is around the first difference."""
        if self.key in (*PARTS, *CONTENT_KEYS):
            return repr(short(str(self.old))), repr(short(str(self.new)))
        old, new = repr(self.old), repr(self.new)
        same = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
        start = max(0, same - 20) if max(len(old), len(new)) > _SHOWN else 0
        return _cut(old, start), _cut(new, start)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every key whose value differs, in the order of the keys (`altering_values`)."""
    before, now = ({**LATER, **values} for values in (old, new))
    keys = {key for key in (*old, *new) if before.get(key) != now.get(key)}
    if "model.products" in keys:  # of which the number of layers that keep theirs is a part
        keys.discard("model.num_layers_at_start_in_bf16")
    return [Change(key, before.get(key), now.get(key)) for key in sorted(keys)]


def content_changes(recorded: RunIdentity, now: RunIdentity) -> list[Change]:
    """Every part that is known of both and differs."""
    both = [part for part in PARTS if part in recorded.parts and part in now.parts]
    return [
        Change(part, recorded.parts[part], now.parts[part])
        for part in both
        if recorded.parts[part] != now.parts[part]
    ]


def refuse_changes(
    changed: Sequence[Change], allowed: Sequence[str], place: str, instead: str = OTHER_RUN
) -> None:
    """ConfigError with every change that is not allowed.

    `place`: what was begun otherwise, a run or a checkpoint; `instead`: what else can be done.
    """
    never = [change for change in changed if change.key in _NEVER]
    refused = [change for change in changed if change.key not in _NEVER and not is_allowed(change, allowed)]
    if not never and not refused:
        return
    lines = [f"{change}; {_NEVER[change.key]}, which no --allow changes" for change in never]
    lines += [f"{change}; give the run's value, or --allow {change.key}" for change in refused]
    raise ConfigError(
        [
            *lines,
            f"{place}: was begun otherwise (values that differ: {len(never) + len(refused)}); {instead}",
        ]
    )


def refuse_unknown_keys(allowed: Sequence[str], known: Sequence[str]) -> None:
    """ConfigError for an `--allow` that names nothing, with the nearest key."""
    _refuse_unknown(allowed, [*known, *CONTENT_KEYS, *PARTS], "value of a run")


def refuse_unknown_parts(allowed: Sequence[str], parts: Sequence[str]) -> None:
    """ConfigError for an `--allow` that names none of these parts, nor all of data or model, with the nearest."""
    _refuse_unknown(
        allowed, [*parts, *(key for key in CONTENT_KEYS if key[:4] in {p[:4] for p in parts})], "part"
    )


def _refuse_unknown(allowed: Sequence[str], keys: Sequence[str], what: str) -> None:
    problems = []
    for key in allowed:
        if key in keys:
            continue
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {near[0]}?" if near else "name a key that the refusal names"
        if "," in key:
            hint = "give one key, and --allow again for each further one"
        problems.append(f"--allow {printable(key)[:60]}: no {what} has that name ({len(keys)} have); {hint}")
    if problems:
        raise ConfigError(problems)


def consequences(changed: Sequence[Change]) -> Iterator[str]:
    """What each change does to the rest of the run, in one line each."""
    for change in changed:
        old, new = change.shown()
        section = change.key.partition(".")[0]
        meaning = _CONSEQUENCES.get(change.key) or _BY_SECTION.get(section, _ANY_OTHER)
        yield f"{change.key}: {old} -> {new}; {meaning}"


def tie_contents(allowed: Sequence[str], contents: Mapping[str, str]) -> list[str]:
    """Tie what is allowed about contents to those of now: digests by part, or by a key of `CONTENT_KEYS`.

    An allowance stays with a run. What will lie behind the same name later was not meant by it.
    """
    tied = [
        _tied(key, content)
        for key, content in contents.items()
        if is_allowed(Change(key, None, content), allowed)
    ]
    return sorted({*allowed, *tied} - {*CONTENT_KEYS, *PARTS})


def still_allowed(before: Sequence[str], allow: Sequence[str]) -> list[str]:
    """Return those of the values allowed before that a new request does not allow anew."""
    anew = [
        key for key in (*PARTS, *CONTENT_KEYS) if not {key, *_MAKE_CONTENT.get(key, ())}.isdisjoint(allow)
    ]
    return [entry for entry in before if entry.partition("=")[0] not in anew]


def is_allowed(change: Change, allowed: Sequence[str]) -> bool:
    """An entry names the value, the content of now, or what makes another content."""
    wider = _MAKE_CONTENT.get(change.key, ())
    names = (change.key, *(key for key in wider if key in CONTENT_KEYS))
    if not {*names}.isdisjoint(allowed):
        return True
    if any(entry.startswith(f"{name}=") for entry in allowed for name in names):
        return any(_tied(name, str(change.new)) in allowed for name in names)
    return not {*wider}.isdisjoint(allowed)


def _tied(key: str, content: str) -> str:
    return f"{key}={short(content)}"


def _cut(text: str, start: int) -> str:
    end = start + _SHOWN
    return f"{'...' if start else ''}{text[start:end]}{'...' if len(text) > end else ''}"
