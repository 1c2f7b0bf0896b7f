"""The base as a 4-bit training saw it: every quantized weight rounded to 4 bits and back, by bitsandbytes itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from launch.errors import CheckpointError
from launch.recipe.schema import Recipe
from trainer.export.base_model import base_family
from trainer.formats.key_names import canonical_name


@dataclass(frozen=True)
class Rounding:
    """How a run's base was quantized. `names`: canonical names of the tensors that were."""

    quant_type: str
    double_quant: bool
    dtype: torch.dtype  # in which the model was loaded, and which the weights come back in
    names: frozenset[str]

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a whole weight [out, in] after 4 bits and back, in `dtype`.

        bitsandbytes' CPU code. Double quantization takes the mean over all blocks of a tensor, so no less than a
        whole tensor gives the same numbers.
        """
        packed, state = functional.quantize_4bit(
            weight.to(self.dtype),
            blocksize=64,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        rounded: Tensor = functional.dequantize_4bit(packed, state)
        return rounded

    def __str__(self) -> str:
        double = " with double quantization" if self.double_quant else ""
        return f"{self.quant_type}{double} of {str(self.dtype).removeprefix('torch.')}"


def rounding_of(recipe: Recipe | None, base: Path) -> Rounding:
    """Return the rounding of a run's base.

    Raises:
        CheckpointError: the recipe is not known, or trained on weights that were not quantized.
    """
    if recipe is None:
        raise CheckpointError(
            "--base dequantized: the adapter lies in no run, which would say how its base was quantized; give the "
            "training's recipe with --recipe, or merge into the original weights"
        )
    quantization = recipe.quantization
    if not quantization.load_in_4bit:
        raise CheckpointError(
            "--base dequantized: the run trained on weights that were not quantized (quantization.load_in_4bit: "
            "false); leave --base out"
        )
    names = frozenset(canonical_name(name) for name in quantized_modules(base))
    weights = frozenset(f"{name}.weight" for name in names)
    return Rounding(
        quantization.bnb_4bit_quant_type,
        quantization.bnb_4bit_use_double_quant,
        getattr(torch, recipe.model.dtype),
        weights,
    )


def quantized_modules(base: Path) -> list[str]:
    """Module names that transformers quantizes when it loads a model in 4 bits: asked of it, on an empty model."""
    family = base_family(base)
    config = getattr(transformers, family.config_class).from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        model = getattr(transformers, family.model_class)(config)
    kept = get_keys_to_not_convert(model)
    replaced = replace_with_bnb_linear(
        model, modules_to_not_convert=kept, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    return [name for name, module in replaced.named_modules() if isinstance(module, Linear4bit)]
