"""Names of modules and tensors: of the hub, of transformers 4 and 5, and what wrappers and PEFT put around them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from launch.errors import CheckpointError
from launch.untrusted_files import printable

PREFIX = "base_model.model."  # of every key in a PEFT adapter
ADAM_STATE_KEYS = ("exp_avg", "exp_avg_sq")  # of AdamW for each parameter, beside its step count
DEFAULT_ADAPTER = "default"  # the name that PEFT gives to an adapter without one

# Module names of transformers 4 and 5, and tensor names on the hub, in one form. The first match counts.
_LAYOUTS = (
    (re.compile(r"^model\.language_model\."), "text."),  # transformers >= 4.52 in memory
    (re.compile(r"^model\.visual\."), "visual."),
    (re.compile(r"^language_model\.model\."), "text."),
    (re.compile(r"^model\."), "text."),  # the hub, and transformers < 4.52 in memory (visual.* stays)
)
_IN_MEMORY = ((re.compile(r"^text\."), "model.language_model."), (re.compile(r"^visual\."), "model.visual."))
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LORA = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$"
)
_SAVED = re.compile(r"^(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>.+)$")
_PLAIN = re.compile(r"^(?P<module>.+)\.(?P<parameter>[^.]+)$")
_WHOLE_MODEL = (".base_layer.", ".original_module.")  # only in the state of a model that holds its base


def canonical_name(name: str) -> str:
    """Return one name for a module or tensor of transformers 4, of transformers 5 and on the hub."""
    for pattern, replacement in _LAYOUTS:
        changed, hits = pattern.subn(replacement, name)
        if hits:
            return changed
    return name


def memory_name(name: str) -> str:
    """Return the module's name in a Qwen2-VL of transformers 5, whatever version wrote it."""
    name = canonical_name(name)
    for pattern, replacement in _IN_MEMORY:
        name = pattern.sub(replacement, name)
    return name


def adapter_key(raw: str) -> tuple[str, str | None]:
    """Return the key that PEFT 0.21 with transformers 5 writes to a file, and the adapter's name if `raw` has it.

    `raw` is a key of an adapter file, of a PeftModel's state, of a sharded checkpoint of it, or a parameter name.
    """
    name = _WRAPPERS.sub("", raw).removeprefix("module.")
    if name.startswith("model." + PREFIX):
        name = name.removeprefix("model.")
    name = name.removeprefix(PREFIX)
    if match := _LORA.match(name):
        suffix = ".weight" if match["part"] in ("lora_A", "lora_B") else ""
        return f"{PREFIX}{memory_name(match['module'])}.{match['part']}{suffix}", match["adapter"]
    if match := _SAVED.match(name):
        return f"{PREFIX}{memory_name(match['module'])}.{match['parameter']}", match["adapter"]
    return PREFIX + memory_name(name), None


def adapter_keys(raw_keys: Mapping[str, object] | list[str], where: object) -> dict[str, str]:
    """{key in `raw_keys`: key in an adapter file} for all that belongs to the adapter; a base's own tensors left out.

    Raises:
        CheckpointError: several adapters are in it, two keys mean one tensor, or one cannot be a name.
    """
    if odd := [raw for raw in raw_keys if not raw.isprintable()]:
        raise CheckpointError(
            f"{where}: holds a tensor that no model has ({printable(odd[0])[:200]}); copy the checkpoint again"
        )
    whole_model = any(mark in key for key in raw_keys for mark in _WHOLE_MODEL)
    key_of_raw: dict[str, str] = {}
    adapters: set[str] = set()
    for raw in raw_keys:
        key, adapter = adapter_key(raw)
        trained = is_lora(key) or ".modules_to_save." in raw
        if whole_model and not trained:
            continue
        if adapter is not None:
            adapters.add(adapter)
        key_of_raw[raw] = key
    if len(adapters) > 1:
        raise CheckpointError(
            f"{where}: holds {len(adapters)} adapters ({', '.join(sorted(adapters))}); save the one you mean alone"
        )
    if len(set(key_of_raw.values())) < len(key_of_raw):
        keys = sorted(key_of_raw.values())
        twice = next(a for a, b in itertools.pairwise(keys) if a == b)
        raise CheckpointError(
            f"{where}: {twice} is there twice, under two names; the file was put together wrongly"
        )
    return key_of_raw


def is_lora(key: str) -> bool:
    """Return whether a key of an adapter file is a part of a LoRA layer (else it is a module saved whole)."""
    return _LORA.match(key) is not None


def parameter_name(key: str) -> str:
    """Return the name that the tensor of an adapter file has among the parameters of a PeftModel."""
    if match := _LORA.match(key):
        suffix = "" if match["part"].startswith("lora_embedding") else ".weight"
        return f"{match['module']}.{match['part']}.{DEFAULT_ADAPTER}{suffix}"
    match = _PLAIN.match(key)
    assert match is not None, key
    return f"{match['module']}.modules_to_save.{DEFAULT_ADAPTER}.{match['parameter']}"


def lora_part(key: str) -> tuple[str, str] | None:
    """Module and part (`lora_A`, `lora_B`, ...) of a key in an adapter file; None when it is no part of a LoRA."""
    match = _LORA.match(key.removeprefix(PREFIX))
    return (match["module"], match["part"]) if match else None
