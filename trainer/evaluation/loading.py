"""Models that answer: the recipe's base with any number of adapters on it, or a merged model."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from launch.planning.make_plan import compute_dtype_of
from launch.recipe.schema import Recipe
from trainer.evaluation.request import EvaluationTask, Variant
from trainer.export.adapter import Adapter, read_adapter
from trainer.export.consolidate import write_adapter
from trainer.formats.portable import set_adapter
from trainer.generation.replica import Replica, why_stock
from trainer.model.base import RECIPE_DTYPES, load_base, prepare_answers
from trainer.model.resident import dequantize_weights
from trainer.pretrained import model_class_of

if TYPE_CHECKING:
    from trainer.data.splits import Rows  # its library takes half a second, and who asks reads no rows

SHARE = 0.5  # of free memory; the rest is for activations, the cache of keys and values, and image features


def load_replica(
    task: EvaluationTask,
    processor: ProcessorMixin,
    rows: Rows,
    device: torch.device,
    variants: Sequence[Variant],
) -> Replica:
    """Return the recipe's base with every adapter that the variants need.

    Where they are of the merged model: that one, unquantized, in the dtype it is stored in.
    """
    recipe = task.recipe
    if variants[0].is_merged:
        model: PreTrainedModel | PeftModel = load_stored(task.request.run.merged, device)
        dtype = model.dtype
    else:
        model = load_with_adapters(recipe, device, variants)
        dtype = RECIPE_DTYPES[compute_dtype_of(recipe)]
    return replica_of(model, processor, rows, recipe.evaluation.max_new_tokens, dtype)


def replica_of(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Rows,
    max_new_tokens: int,
    dtype: torch.dtype,
) -> Replica:
    """Return a model that answers, prepared to do it fast where it can."""
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    stock = why_stock(base)
    if stock is None:
        prepare_answers(base, dtype)
    return Replica(model, processor, rows, max_new_tokens, dtype, stock=stock)


def load_with_adapters(
    recipe: Recipe, device: torch.device, variants: Sequence[Variant]
) -> PreTrainedModel | PeftModel:
    """Return the recipe's base with every adapter that the variants need, each loaded once under its folder's name."""
    model: PreTrainedModel | PeftModel = load_base(recipe, device)
    for folder in dict.fromkeys(variant.adapter for variant in variants):
        if folder is not None:
            model = add_adapter(model, folder)
    if device.type == "cuda" and recipe.model.resident_weights is not False:
        hold_dequantized(model, RECIPE_DTYPES[compute_dtype_of(recipe)], torch.cuda.mem_get_info(device)[0])
    return model.eval()


def hold_dequantized(model: nn.Module, dtype: torch.dtype, room: int) -> bool:
    """Hold 4-bit weights dequantized, where they take no more than `SHARE` of the `room` that is free, in bytes.

    The answers are the same. In 4 bits every token of an answer dequantizes the whole model.
    """
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    needed = sum(module.in_features * module.out_features for module in packed) * dtype.itemsize
    if not packed or needed > SHARE * room:
        return False
    dequantize_weights(model, dtype)
    return True


def load_stored(
    folder: Path, device: torch.device, dtype: torch.dtype | Literal["auto"] = "auto"
) -> PreTrainedModel:
    """Return a model as it lies in a folder, unquantized; `auto`: in the dtype it is stored in."""
    model = model_class_of(folder).from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
    )
    return cast(PreTrainedModel, model.eval())


def add_adapter(model: PreTrainedModel | PeftModel, folder: Path) -> PeftModel:
    """Put one more adapter on a base, of a run, a checkpoint or a folder of any library.

    Raises:
        CheckpointError: it cannot be read, or does not fit the base.
    """
    adapter, name = read_adapter(folder), peft_name_of(folder)
    with TemporaryDirectory() as place:
        write_adapter(with_named_targets(adapter), Path(place))  # as PEFT's present version reads it
        if isinstance(model, PeftModel):
            model.load_adapter(place, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, place, adapter_name=name)
    # PEFT says nothing about keys that match no layer.
    set_adapter(model, adapter.tensors, folder, name)
    return cast(PeftModel, model)


def with_named_targets(adapter: Adapter) -> Adapter:
    """Return the adapter with the names of its modules in place of patterns: PEFT matches patterns against every module
    of the model, and these are known to end.
    """
    named = {"target_modules": sorted(pair.module for pair in adapter.pairs)}
    patterns = dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform"))
    return replace(adapter, config=adapter.config | named | patterns)


def peft_name_of(folder: Path) -> str:
    """Return what PEFT calls the adapter of a folder: a name without dots, which part the names of modules."""
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}".replace(".", "-")


def answering_as(model: Any, variant: Variant) -> AbstractContextManager[Any]:
    """Let the model have the adapter of a variant, or none, inside the block."""
    if not isinstance(model, PeftModel):
        return nullcontext()
    if variant.adapter is None:
        return cast(AbstractContextManager[Any], model.disable_adapter())
    model.set_adapter(peft_name_of(variant.adapter))
    return nullcontext()


def release() -> None:
    """Give back the memory of a model that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
