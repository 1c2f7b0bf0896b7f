"""Whether a merged model's folder has what a loader outside of this project needs: vLLM, llama.cpp, transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError, ConfigError
from launch.run.directory import RunDirectory
from launch.run.merged_model import merge_behind
from launch.untrusted_files import (
    DOCUMENT,
    TABLE,
    UNREADABLE,
    path_inside,
    plain_size,
    read_mapping,
    reason_of,
)

_HUB_PREFIXES = ("model.", "visual.", "lm_head.")
"""Of the tensors' names on the hub, which vLLM maps to its own modules."""
_TRAINING_PARTS = (".lora_", "base_model.", ".base_layer.", ".absmax", ".quant_state")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Loadable:
    """One thing that a loader needs: what it is, and what was found."""

    need: str
    finding: str


def check_loadable(run: RunDirectory) -> list[Loadable]:
    """Check the run's merged model. Returns what was found of each need.

    Raises:
        ConfigError: there is no merged model, or it is of another adapter.
        CheckpointError: something that a loader needs is missing or wrong; every problem at once.
    """
    folder = run.merged
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no merged model yet; make it with `samestep merge {run.path}`")
    if behind := merge_behind(run, folder):
        raise ConfigError(behind)
    checks: list[Loadable] = []
    problems: list[str] = []
    for check in (_config, _weights, _processor, _generation):
        try:
            checks += check(folder)
        except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
            problems.append(f"{folder}: {_words(error)}; merge again with `samestep merge {run.path}`")
        except _MissingError as error:
            problems.append(f"{folder}: {error}; merge again with `samestep merge {run.path}`")
    if problems:
        raise CheckpointError("\n".join(problems))
    return checks


class _MissingError(Exception):
    """What a loader would not find, in words."""


def _words(error: Exception) -> str:
    return (
        reason_of(error) if isinstance(error, OSError | ConfigError) else f"{type(error).__name__} ({error})"
    )


def _config(folder: Path) -> Iterator[Loadable]:
    config = read_mapping(folder / "config.json")
    architectures = config.get("architectures")
    if not architectures or not isinstance(architectures, list):
        raise _MissingError("config.json names no architectures")
    if "quantization_config" in config:
        raise _MissingError("config.json has a quantization_config, but the merged weights are not quantized")
    dtype = config.get("dtype") or config.get("torch_dtype")
    yield Loadable("config", f"{architectures[0]}, model_type {config['model_type']}, {dtype}")


def _weights(folder: Path) -> Iterator[Loadable]:
    names = _tensor_names(folder)
    if wrong := sorted(name for name in names if any(part in name for part in _TRAINING_PARTS)):
        raise _MissingError(f"{len(wrong)} tensors are named as in training ({wrong[0]})")
    if wrong := sorted(name for name in names if not name.startswith(_HUB_PREFIXES)):
        raise _MissingError(f"{len(wrong)} tensors are not named as on the hub ({wrong[0]})")
    tied = _tied(read_mapping(folder / "config.json"))
    if "lm_head.weight" not in names and not tied:
        raise _MissingError("lm_head.weight is missing, and config.json does not tie it to the embeddings")
    yield Loadable("weights", f"{len(names)} tensors with the hub's names{', head tied' if tied else ''}")


def _tied(config: dict[str, Any]) -> bool:
    inner = config.get("text_config")
    tied = config.get(
        "tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
    )
    return bool(tied)


def _tensor_names(folder: Path) -> set[str]:
    """Of all weight files, each as long as its header says; the same as those of the index, where there is one."""
    from safetensors import SafetensorError, safe_open

    index, expected = folder / "model.safetensors.index.json", None
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        places = read_mapping(index, TABLE)["weight_map"]
        files, expected = sorted({path_inside(folder, folder / name) for name in places.values()}), {*places}
    names: set[str] = set()
    for file in files:
        plain_size(file)
        try:
            with safe_open(file, "np") as opened:
                names |= {*opened.keys()}
        except SafetensorError as error:
            raise _MissingError(f"{file.name} is damaged ({error})") from None
    if not names:
        raise _MissingError("there are no weights")
    if expected is not None and names != expected:
        raise _MissingError(f"{len(names ^ expected)} tensors differ between the files and {index.name}")
    return names


def _processor(folder: Path) -> Iterator[Loadable]:
    image = next((name for name in _PROCESSORS if (folder / name).is_file()), None)
    if image is None:
        raise _MissingError(f"none of {', '.join(_PROCESSORS)} is there, so no image could be read")
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise _MissingError(f"{', '.join(missing)} missing")
    tokenizer = read_mapping(folder / "tokenizer_config.json", DOCUMENT)
    templates = [name for name in ("chat_template.jinja", "chat_template.json") if (folder / name).is_file()]
    if not templates and not tokenizer.get("chat_template"):
        raise _MissingError("there is no chat template, so a chat would be refused")
    yield Loadable("processor", f"{image}, tokenizer.json, {templates[0] if templates else 'chat template'}")


def _generation(folder: Path) -> Iterator[Loadable]:
    generation = read_mapping(folder / "generation_config.json")
    ends = generation.get("eos_token_id")
    if ends is None:
        raise _MissingError("generation_config.json has no eos_token_id, so answers would not end")
    yield Loadable("generation", f"ends at token {ends}")
