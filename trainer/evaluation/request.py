"""What is evaluated: which models answer which questions, under which system message, and where that is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.atomic_files import refuse_readonly
from launch.checkpoints.adapter_file import read_digest
from launch.checkpoints.manifest import read_manifest
from launch.errors import CheckpointError, ConfigError
from launch.inputs.dataset_index import Index, SplitName
from launch.inputs.identity import WEIGHTS_PART, model_identity
from launch.planning.make_plan import compute_dtype_of
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.evaluation_target import missing_models
from launch.run.merged_model import merged_digest
from launch.run.variants import NO_PROMPT, file_suffix, parse_variant, read_prompt


@dataclass(frozen=True)
class EvaluationRequest:
    """What is asked for. `models`: names as of `launch.run.variants`.

    `allow`: parts of the run's identity that may differ from the training's. `checkpoint`: the step of the checkpoint
    that is asked instead of the run's last adapter; `adapter_folder`: another adapter that is. `label`: of the file
    with the results. `recipe_file`, `overrides`: in place of the run's recipe. `prompt_file`: a system message.
    """

    run: RunDirectory
    split: SplitName
    models: tuple[str, ...]
    max_samples: int | None
    allow: tuple[str, ...] = ()
    checkpoint: int | None = None
    adapter_folder: Path | None = None
    label: str = ""
    recipe_file: Path | None = None
    overrides: tuple[str, ...] = ()
    prompt_file: Path | None = None

    @property
    def adapter(self) -> Path:
        """Return the folder with the adapter."""
        if self.adapter_folder is not None:
            return self.adapter_folder
        return self.run.adapter if self.checkpoint is None else self.run.checkpoint(self.checkpoint)

    @property
    def file(self) -> Path:
        """The file in which figures and answers are written together."""
        return self.run.eval_file(self.split, self.max_samples, self.checkpoint, self.label)

    @property
    def trained_at(self) -> Path | None:
        """The folder whose record says what was trained; None where nothing of what answers is a training's."""
        if self.adapter_folder is not None:
            return self.adapter_folder
        return None if self.label else self.run.path

    def recipe(self) -> Recipe:
        """Return the recipe that names data and base. ConfigError."""
        return load_recipe(self.recipe_file or self.run.recipe_file, self.overrides)


@dataclass(frozen=True)
class EvaluationTask:
    """The request with what it needs."""

    request: EvaluationRequest
    recipe: Recipe
    index: Index


@dataclass(frozen=True)
class Variant:
    """One column of the result. `adapter`: the folder of the adapter that is put on the base, None for none.

    `is_merged`: the run's merged model answers. `shuffled`: every question comes with another one's image. `prompt`:
    the suffix of its name; `system_message`: None for the chat template's own.
    """

    name: str
    adapter: Path | None
    is_merged: bool
    shuffled: bool
    prompt: str
    system_message: str | None


def variants_of(request: EvaluationRequest, recipe: Recipe) -> list[Variant]:
    """Return every model that is asked, in the order of the request. ConfigError when the prompt's file is gone."""
    return [_variant(model, request, recipe) for model in request.models]


def _variant(model: str, request: EvaluationRequest, recipe: Recipe) -> Variant:
    name = parse_variant(model)
    adapter = None
    if name.weights in ("adapter", "shuffled"):
        adapter = request.adapter
    elif name.weights == "best":
        adapter = request.run.best_adapter
    elif name.step is not None:
        adapter = request.run.checkpoint(name.step)
    message: str | None = recipe.data.system_message
    if name.prompt == NO_PROMPT:
        message = None
    elif name.prompt:
        message = _message_of(name.prompt, request.prompt_file)
    return Variant(model, adapter, name.weights == "merged", name.weights == "shuffled", name.prompt, message)


def _message_of(suffix: str, file: Path | None) -> str:
    if file is None or file_suffix(file) != suffix:
        raise ConfigError(f"--models: {suffix} needs its file; give it with --prompt")
    return read_prompt(file)


def check_evaluation_request(request: EvaluationRequest) -> None:
    """Refuse what is missing before a model is loaded."""
    run = request.run
    if request.recipe_file is None and not run.recipe_file.is_file():
        raise ConfigError(f"--run-dir {run.path}: has no recipe.yaml; give the directory of a run")
    if request.checkpoint is not None:
        read_manifest(request.adapter, verify=True)
    if problems := missing_models(run, request.models, request.checkpoint, request.adapter_folder):
        raise ConfigError(problems)
    refuse_readonly(run.path, "the evaluation")


def weights_of(request: EvaluationRequest, models: Iterable[str] = ()) -> dict[str, str | None]:
    """Return what the weights of these models are of now, those asked where none are named; None where that is not
    known.
    """
    return {model: _weights(request, model) for model in models or request.models}


def _weights(request: EvaluationRequest, model: str) -> str | None:
    name = parse_variant(model)
    if name.weights == "base":
        return None
    if name.weights == "merged":
        return merged_digest(request.run.merged)
    if name.weights in ("adapter", "shuffled"):
        return (
            _checkpoint_digest(request.adapter)
            if request.checkpoint is not None
            else read_digest(request.adapter)
        )
    folder = request.run.best_adapter if name.step is None else request.run.checkpoint(name.step)
    return read_digest(folder) or _checkpoint_digest(folder)


def _checkpoint_digest(folder: Path) -> str | None:
    """Of a checkpoint, whatever form its adapter has; None where there is none any more."""
    try:
        return str(read_manifest(folder)["sha256"])
    except CheckpointError:
        return None


def answer_facts(
    variant: Variant, request: EvaluationRequest, recipe: Recipe, identity: Mapping[str, str]
) -> dict[str, Any]:
    """Return everything that a variant's answers depend on beside the questions: equal facts, equal answers.

    `identity`: of base and processor, by part. Reads a merged model's weights once in a cache's lifetime.
    """
    weights: dict[str, Any]
    if variant.is_merged:
        weights = {"merged": model_identity(request.run.merged).parts[WEIGHTS_PART]}
    else:
        weights = {
            "base": identity.get(WEIGHTS_PART),
            "quantization": recipe.quantization.model_dump(),
            "dtype": recipe.model.dtype,
            "adapter": variant.adapter and (read_digest(variant.adapter) or _digest_of_any(variant.adapter)),
        }
    parts = ("model.processor", "model.chat_template", "model.tokenizer", "model.generation")
    return {
        "weights": weights,
        "images": "shuffled" if variant.shuffled else "own",
        "system_message": variant.system_message,
        "split": request.split,
        "source": [recipe.data.dataset, getattr(recipe.data, request.split)],
        "pixels": [recipe.data.min_pixels, recipe.data.max_pixels],
        "processor": {part: identity.get(part) for part in parts},
        "decoding": {
            "do_sample": False,
            "max_new_tokens": recipe.evaluation.max_new_tokens,
            "compute_dtype": compute_dtype_of(recipe),
        },
    }


def _digest_of_any(folder: Path) -> str:
    """Of an adapter in the form of another library, or in shards: of every file that lies there."""
    from launch.inputs.file_digests import files_digest

    return _checkpoint_digest(folder) or files_digest(sorted(f for f in folder.rglob("*") if f.is_file()))
