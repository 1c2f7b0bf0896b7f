"""Models that answer: the recipe's base with any number of adapters on it, or a merged model."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from launch.planning.make_plan import compute_dtype_of
from trainer.data.splits import Rows
from trainer.evaluation.answers import Replica
from trainer.evaluation.request import Task, Variant
from trainer.export.adapter import Adapter, read_adapter
from trainer.export.consolidate import write_adapter
from trainer.formats.portable import put_adapter
from trainer.model.base import DTYPES, load_base
from trainer.pretrained import model_class_of


def load_replica(
    task: Task, processor: ProcessorMixin, rows: Rows, device: torch.device, variants: Sequence[Variant]
) -> Replica:
    """The recipe's base with every adapter that the variants need, each loaded once under its folder's name."""
    recipe = task.recipe
    model: PreTrainedModel | PeftModel = load_base(recipe, device)
    for folder in dict.fromkeys(variant.adapter for variant in variants):
        if folder is not None:
            model = add_adapter(model, folder)
    model.eval()
    return Replica(model, processor, rows, recipe.evaluation.max_new_tokens, DTYPES[compute_dtype_of(recipe)])


def load_merged(
    task: Task, processor: ProcessorMixin, rows: Rows, device: torch.device, variants: Sequence[Variant]
) -> Replica:
    """The run's merged model, unquantized, in the dtype it is stored in."""
    model = (
        model_class_of(task.request.run.merged)
        .from_pretrained(
            task.request.run.merged,
            dtype="auto",
            device_map={"": device},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )
        .eval()
    )
    return Replica(model, processor, rows, task.recipe.evaluation.max_new_tokens, model.dtype)


def add_adapter(model: PreTrainedModel | PeftModel, folder: Path) -> PeftModel:
    """Put one more adapter on a base, of a run, a checkpoint or a folder of any library.

    Raises:
        CheckpointError: it cannot be read, or does not fit the base.
    """
    adapter, name = read_adapter(folder), name_of(folder)
    with TemporaryDirectory() as place:
        write_adapter(with_named_targets(adapter), Path(place))  # as PEFT's present version reads it
        if isinstance(model, PeftModel):
            model.load_adapter(place, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, place, adapter_name=name)
    # PEFT says nothing about keys that match no layer.
    put_adapter(model, adapter.tensors, folder, name)
    return cast(PeftModel, model)


def with_named_targets(adapter: Adapter) -> Adapter:
    """PEFT matches patterns against every module of the model: those of the adapter alone are known to end."""
    named = {"target_modules": sorted(pair.module for pair in adapter.pairs)}
    patterns = dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform"))
    return replace(adapter, config=adapter.config | named | patterns)


def name_of(folder: Path) -> str:
    """What PEFT calls the adapter of a folder: one name a folder, without dots, which part the names of modules."""
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}".replace(".", "-")


def answering_as(model: Any, variant: Variant) -> AbstractContextManager[Any]:
    """Inside, the model has the adapter of a variant, or none."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    if variant.adapter is None:
        return cast(AbstractContextManager[Any], model.disable_adapter())
    model.set_adapter(name_of(variant.adapter))
    return nullcontext()


def release() -> None:
    """Give back the memory of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
