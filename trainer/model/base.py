"""The frozen base, quantized to 4 bits or plain, and how it is made to compute on packed micro-batches.

Dtypes: the base is in `model.dtype`, or NF4 in `quant_storage` bytes that are dequantized to `bnb_4bit_compute_dtype`;
LoRA is fp32 under every strategy; products are in the dtype of one autocast inside the model's forward (`compute_in`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from launch.errors import ConfigError
from launch.recipe.fp8_layers import layers_in_8_bits
from launch.recipe.schema import Recipe
from launch.units import gib
from launch.untrusted_files import printable
from trainer.model.attention import use_packed_attention
from trainer.model.dropout import use_sample_dropout
from trainer.model.families.registry import modelling_of
from trainer.model.fp8 import use_fp8_products
from trainer.model.head import patch_forward_target_logprobs
from trainer.model.last_layer import compute_read_tokens_only, plain_layer
from trainer.model.layers import append_layers, is_of_layer, keep_cpu_weights
from trainer.model.resident import dequantize_weights
from trainer.model.vision import Keep, register_packed_inputs, trained_tower
from trainer.pretrained import base_path, family_at

RECIPE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_base(
    recipe: Recipe,
    device: torch.device,
    quant_storage: str = "uint8",
    take_layer: Callable[[nn.Module], None] | None = None,
    layers: bool = True,
) -> PreTrainedModel:
    """Load the base model onto one device: NF4 through bitsandbytes, or plain, as the recipe says; nothing trains.

    Every process loads its own replica onto its own device: never `device_map="auto"` in a distributed run. With
    `take_layer` the decoder layers are read one after another, each handed over while it is the only whole one;
    without `layers` they are left out. `quant_storage`: the dtype that packed 4-bit weights are held in, of the
    strategy (`launch.strategies`).

    Raises:
        ConfigError: the base is not there, is of no family that is known, or lacks tensors.
    """
    path = base_path(recipe)
    family = family_at(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        kinds = list(getattr(text, "layer_types", None) or [None] * text.num_hidden_layers)
    except Exception as error:  # transformers raises a dozen types over values of another kind
        raise ConfigError(
            f"model.name_or_path: {path}/config.json: {_why(error)}; get the model again"
        ) from error
    loud = transformers.logging.get_verbosity()
    without = take_layer is not None or not layers
    if without:
        text.num_hidden_layers = 0
        if hasattr(text, "layer_types"):
            text.layer_types = []
        transformers.logging.set_verbosity_error()  # its report calls every tensor of the layers unexpected
    try:
        model, report = getattr(transformers, family.model_class).from_pretrained(
            path,
            config=config,
            dtype=RECIPE_DTYPES[recipe.model.dtype],
            quantization_config=_quantization(recipe, quant_storage),
            device_map={"": device},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if str(error).startswith("DataLoader worker"):  # one that was begun before has been killed
            raise
        raise ConfigError(
            f"model.name_or_path: {path} cannot be loaded as a {family.name} ({_why(error)}); "
            "check the folder, or delete a damaged download and run `samestep prepare` again"
        ) from error
    finally:
        transformers.logging.set_verbosity(loud)
    # transformers fills what a file lacks with random numbers, and only says so in a log.
    unexpected = [key for key in report["unexpected_keys"] if not (without and is_of_layer(key))]
    if wrong := sorted(map(str, [*report["missing_keys"], *unexpected, *report["mismatched_keys"]])):
        raise ConfigError(
            f"model.name_or_path: the weights in {path} are not those of a whole {family.name} ({len(wrong)} tensors "
            f"are missing, unknown or of another shape, such as {wrong[0]}); get them again"
        )
    model.requires_grad_(False)
    if take_layer is not None:
        for layer in append_layers(model, Path(path), kinds, _quantization(recipe, quant_storage), device):
            take_layer(layer)
    model.config.use_cache = False
    keep_cpu_weights(model)
    return model


def _why(error: Exception) -> str:
    words = next(iter(str(error).strip().splitlines()), "")[:300]
    return printable(words) or type(error).__name__


def _quantization(recipe: Recipe, quant_storage: str) -> BitsAndBytesConfig | None:
    """bitsandbytes quantizes every linear layer but `lm_head`, the vision tower's too."""
    chosen = recipe.quantization
    if not chosen.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=chosen.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=chosen.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=RECIPE_DTYPES[chosen.bnb_4bit_compute_dtype],
        bnb_4bit_quant_storage=getattr(torch, quant_storage),
    )


def prepare_training(
    model: PeftModel,
    recipe: Recipe,
    *,
    compute_dtype: torch.dtype = torch.float32,
    recompute_every: int = 0,
    resident_weights: bool = False,
    keep: Keep | None = None,
) -> str:
    """Make the model take packed micro-batches: attention, dropout, image features, recomputation, kernels.

    `compute_dtype`: of the products; `recompute_every`: every n-th decoder layer is computed again in the backward
    pass, 0: none; `resident_weights`: hold 4-bit weights dequantized; `keep`: hears of computed image features.
    Returns in words which way it runs, for the log.

    The order matters: 8-bit products take the 4-bit weights before they are dequantized, and fused kernels take LoRA
    and sample dropout as they are by then.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    said = []
    if recipe.model.products == "fp8":  # before the rest is dequantized
        layers = base.model.language_model.layers
        numbers = layers_in_8_bits(recipe.model, len(layers))
        held = use_fp8_products([layers[n] for n in numbers], compute_dtype, resident=resident_weights)
        which = f"{len(numbers)} of {len(layers)} decoder layers"
        said.append(f"products of {which} in 8 bits ({held / 2**30:.1f} GiB held so)")
    if resident_weights:
        said.append(f"4-bit weights held dequantized ({gib(dequantize_weights(base, compute_dtype))})")
    _prepare_packed(base)
    patch_forward_target_logprobs(base)
    seed = recipe.training.seed
    keys = use_sample_dropout(base.model.language_model, seed)
    tower = trained_tower(base.model.visual, seed)
    register_packed_inputs(base, keys, keep, tower)
    recompute_layers(model, recompute_every)
    if why_not := _no_kernels(base, compute_dtype):
        compute_read_tokens_only(base.model.language_model.layers[-1], plain_layer)
        return "; ".join([*said, f"plain PyTorch kernels ({why_not})"])
    return "; ".join([*said, _use_kernels(base, tower is None)])


def _prepare_packed(model: PreTrainedModel) -> None:
    use_packed_attention(model)
    modelling_of(model).prepare(model)


def _use_kernels(model: PreTrainedModel, frozen_tower: bool) -> str:
    """Switch decoder and vision tower to fused kernels; return in words which. A tower that trains keeps its own."""
    from trainer.model.fused import use_fused_kernels  # imports Triton, which is not everywhere

    family = modelling_of(model)
    use_fused_kernels(model)
    if frozen_tower:
        family.fuse_tower(model.model.visual)
    stock = [
        part for part in (family.stock, "" if frozen_tower else "the vision tower, which trains,") if part
    ]
    own = f"; transformers' own forwards: {', '.join(stock)}" if stock else ""
    return f"fused kernels (Liger's, and LoRA with dropout){own}"


def identify_compiler(device: torch.device) -> None:
    """Let Triton 3.6 make the digest of itself that its kernels' names begin with: half a second, once a process."""
    if device.type == "cuda" and find_spec("triton"):
        with suppress(Exception):  # the first kernel meets it again
            import_module("triton.runtime.cache").triton_key()


def recompute_layers(model: PeftModel, every: int) -> None:
    """Compute every n-th decoder layer again in the backward pass; 0: none.

    The language model only: the tower has no graph. Ours rather than the Trainer's or accelerate's: one way for all
    strategies, and the arguments of a layer (segments, dropout keys) come back in its recomputation.
    """
    language = cast(PreTrainedModel, model.get_base_model()).model.language_model
    language.activation_checkpointing_disable()
    if every:
        language.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


def prepare_tower(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Make the vision tower of a model that does not train compute as it does in training."""
    _prepare_packed(model)
    if not _no_kernels(model, compute_dtype):
        _use_kernels(model, frozen_tower=True)


def prepare_answers(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Make a model that only answers compute as in training, adapters on it or not; transformers can still generate."""
    prepare_tower(model, compute_dtype)
    for part in (model.model.language_model, model.model.visual):
        part.config._attn_implementation = "sdpa"


def _no_kernels(model: PreTrainedModel, compute_dtype: torch.dtype) -> str | None:
    """Say why a model cannot use the fused kernels; None: it can."""
    if model.device.type != "cuda":
        return f"they need a GPU, this is a {model.device.type}"
    if {model.dtype, compute_dtype} != {torch.bfloat16}:
        return "they are for bfloat16"
    missing = [name for name in ("triton", "liger_kernel") if find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Open autocast inside the model's forward, the one precision rule of all strategies.

    Neither accelerate's nor DeepSpeed's mixed precision is used: both would cast fp32 adapters and packed storage.
    """
    if dtype == torch.float32:
        return
    forward = model.forward

    @functools.wraps(forward)
    def in_autocast(*args: Any, **kwargs: Any) -> Any:
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype=dtype):
            return forward(*args, **kwargs)

    model.forward = in_autocast  # type: ignore[method-assign]
