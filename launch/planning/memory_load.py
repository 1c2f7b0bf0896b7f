"""What a recipe asks of each GPU, in numbers: the input of the memory plan (`launch.planning.memory`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.inputs.model_shape import reached_tower_linears
from launch.recipe.fp8_layers import layers_in_8_bits
from launch.strategies import STRATEGIES

if TYPE_CHECKING:
    from launch.inputs.model_shape import ModelShape
    from launch.recipe.schema import Recipe


@dataclass(frozen=True)
class Kernels:
    """How a decoder layer is computed. `fused`, `fused_lora`: through `trainer.model.fused`, whose kernels keep their
    inputs alone."""

    fused: bool = False
    fused_lora: bool = False


@dataclass(frozen=True)
class Load:
    """What a recipe, a strategy and a world ask of each GPU. Sizes of numbers in bytes.

    `targets`: the linear layers of the decoder with a LoRA of rank `lora_rank` at most, `tower_targets`: of the tower,
    by their paths; `dropout`: before them; `dora`: with lengths of rows; `fp8_layers`: decoder layers whose weights are
    of 8 bits where they are held for the products; `rechecked`: some micro-batches are computed a second time.
    """

    shape: ModelShape
    strategy: str = "single"
    world_size: int = 1
    load_in_4bit: bool = True
    double_quantized: bool = True
    weight_bytes: int = 2
    activation_bytes: int = 2
    lora_rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: bool = True
    kernels: Kernels = Kernels()
    tower_targets: tuple[str, ...] = ()
    dora: bool = False
    fp8_layers: int = 0
    rechecked: bool = False

    @property
    def shares(self) -> int:
        """Processes that the decoder layers are cut over."""
        return self.world_size if STRATEGIES[self.strategy].shards_layers else 1


@dataclass(frozen=True)
class Packed:
    """The size of a micro-batch: the tokens of its row, the visual ones among them, the scored ones; `whole_tokens`: of
    its samples, of which a row holds a shared prefix once."""

    tokens: int
    visual_tokens: int
    scored_tokens: int
    whole_tokens: int


@dataclass(frozen=True)
class Settings:
    """What trades memory for time and alters no number; `launch.planning.plan.PlannedSettings` adds why."""

    keep_dequantized: bool
    """4-bit weights are held dequantized, instead of being dequantized for every product."""
    activation_checkpoint_every: int
    """Every n-th decoder layer's activations are recomputed in the backward pass; 0: none."""
    whole_layers: int = 0
    """Decoder layers that stay whole once they were gathered, where a strategy shares them out; the others are gathered
    for each pass."""


def load_of(recipe: Recipe, shape: ModelShape, strategy: str, world_size: int, kernels: Kernels) -> Load:
    """What a recipe asks of each GPU."""
    quantization, lora = recipe.quantization, recipe.lora
    weight_bytes = 2 if recipe.model.dtype == "bfloat16" else 4
    compute = quantization.bnb_4bit_compute_dtype if quantization.load_in_4bit else recipe.model.dtype
    every = tuple(shape.layer_linears)
    named = every if lora.target_modules == "all-linear" else tuple(lora.target_modules)
    return Load(
        shape=shape,
        strategy=strategy,
        world_size=world_size,
        load_in_4bit=quantization.load_in_4bit,
        double_quantized=quantization.bnb_4bit_use_double_quant,
        weight_bytes=weight_bytes,
        activation_bytes=2 if (compute, weight_bytes) == ("bfloat16", 2) else 4,
        lora_rank=max([lora.r, *lora.rank_pattern.values()]),
        targets=tuple(name for name in every if any(word.split(".")[-1] == name for word in named)),
        dropout=lora.lora_dropout > 0,
        kernels=kernels,
        tower_targets=tuple(reached_tower_linears(lora.target_modules, shape)),
        dora=lora.use_dora,
        fp8_layers=len(layers_in_8_bits(recipe.model, shape.layers)),
        rechecked=recipe.training.recheck > 0,
    )
