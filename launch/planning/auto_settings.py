"""The settings that trade memory for time and alter no number of a run: chosen from a GPU's memory where the recipe
says `auto`, and shown with their reason. Torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from launch.errors import ConfigError
from launch.planning.memory import Memory, memory_of
from launch.planning.memory_load import Kernels, Load, Packed, Settings, load_of
from launch.strategies import STRATEGIES
from launch.units import GIB, gib

if TYPE_CHECKING:
    from launch.inputs.dataset_index import Split
    from launch.inputs.model_shape import ModelShape
    from launch.recipe.schema import Recipe

CAUTIOUS_SAMPLES = 4  # of the longest sample in a micro-batch, where nothing is known
RECOMPUTED = (0, 8, 4, 2, 1)  # none, every 8th layer, ... all: what `auto` tries

# Costs in tokens through one forward of the language model, from one H100 and the 7B shape (benchmarks/NOTES.md): a
# micro-batch of its own, and dequantizing all layers once. They only rank settings.
_TOKENS_A_MICRO_BATCH = 900
_TOKENS_A_DEQUANTIZATION = 320
_KEPT_BELOW = 0.95  # of a GPU's memory: what is planned was measured to be right within 5 %
_MOST_VALUES = 2**31 - 1  # of one tensor: kernels count in int32


@dataclass(frozen=True)
class Gpus:
    """The GPUs a run will have, as far as known. `memory`: bytes of the smallest, None: not known; `device`: `cuda` or
    `cpu`."""

    device: str
    memory: int | None = None


@dataclass(frozen=True)
class BatchStatistics:
    """What the prepared data says about micro-batches.

    `longest`: tokens of the longest sample; `step_tokens`: the mean of a rank and step; `most_tokens`: of the
    heaviest; `visual`, `scored`: shares of a micro-batch's tokens at most; `own`: likewise what is not the shared
    prefix, which has `prefix` tokens; `count`: the micro-batches of a rank and step for a budget of tokens.
    """

    longest: int
    step_tokens: float
    most_tokens: int
    visual: float
    scored: float
    own: float
    prefix: int
    count: Callable[[int], int]

    def packed(self, tokens: int) -> Packed:
        """Return a micro-batch of so many tokens at its heaviest."""
        computed = min(tokens, math.ceil(tokens * self.own) + self.prefix)
        return Packed(computed, math.ceil(tokens * self.visual), math.ceil(tokens * self.scored), tokens)


@dataclass(frozen=True)
class ChosenSettings:
    """Settings with what they need (None where the model's shape is not known) and why they were taken."""

    micro_batch_tokens: int
    settings: Settings
    memory: Memory | None
    reason: str
    fits: bool | None = None


def batches_of(
    split: Split, longest: int, global_batch_size: int, world_size: int, count: Callable[[int], int]
) -> BatchStatistics:
    """Count them from a training split; `longest`: of all splits."""
    tokens = split.tokens
    heaviest = int(np.sort(tokens)[-min(global_batch_size, len(tokens)) :].sum())
    return BatchStatistics(
        longest=longest,
        step_tokens=float(tokens.mean()) * global_batch_size / world_size,
        most_tokens=max(longest, math.ceil(heaviest / world_size)),
        visual=float((split.visual_tokens / tokens).max()),
        scored=float((split.target_tokens / tokens).max()),
        own=float((split.own_tokens / tokens).max()),
        prefix=int((tokens - split.own_tokens).max()),
        count=count,
    )


def choose_auto_settings(
    recipe: Recipe,
    gpus: Gpus,
    shape: ModelShape | str,
    strategy: str,
    world_size: int,
    batches: BatchStatistics,
) -> ChosenSettings:
    """Choose the fastest settings that fit the GPU, as far as the recipe leaves them open; what is fixed is respected.

    `shape`: of the base model, or why it is not known. Where it or the memory is not known, what needs the least.
    """
    if isinstance(shape, str):
        return _cautious(recipe, batches, None, shape)
    load = load_of(recipe, shape, strategy, world_size, kernels_of(recipe, gpus))
    if gpus.memory is None:
        what = "the GPU's memory is not known" if gpus.device == "cuda" else "no GPU here"
        return _cautious(
            recipe, batches, load, f"{what}, so little memory (--gpu-memory 24GB: for such GPUs)"
        )
    fitting = [
        (_tokens_of_work(batches, tokens, settings, load), tokens, settings)
        for settings in _open_settings(recipe, strategy, shape)
        if (tokens := _largest_budget(recipe, gpus.memory, load, settings, batches)) is not None
    ]
    if not fitting:
        return _too_large(recipe, gpus.memory, load, batches)
    _, tokens, settings = min(fitting, key=lambda entry: entry[0])
    if recipe.batch.micro_batch_tokens == "auto":
        tokens = _evened_out(tokens, batches)
    packed = batches.packed(tokens)
    settings = replace(settings, whole_layers=_layers_kept_whole(gpus.memory, load, settings, packed))
    memory = memory_of(load, packed, settings)
    return ChosenSettings(tokens, settings, memory, f"the fastest that fits {gib(gpus.memory)}", True)


def less_than(memory: Memory) -> int:
    """Bytes of a GPU that what needs `memory` does not fit: a tenth of its activations less. For after it ran out."""
    return memory.reserved - (memory.activations + memory.temporary) // 10 - 1


def kernels_of(recipe: Recipe, gpus: Gpus) -> Kernels:
    """How decoder layers will be computed there, as `trainer.model.base.prepare_training` decides it."""
    quantization = recipe.quantization
    dtypes = {recipe.model.dtype}
    if quantization.load_in_4bit:
        dtypes.add(quantization.bnb_4bit_compute_dtype)
    cuda = gpus.device == "cuda"
    installed = all(find_spec(name) is not None for name in ("triton", "liger_kernel"))
    fused = cuda and installed and dtypes == {"bfloat16"}
    return Kernels(fused, fused)


def _open_settings(recipe: Recipe, strategy: str, shape: ModelShape) -> Iterator[Settings]:
    """Every combination that the recipe allows."""
    checkpointing = recipe.training.gradient_checkpointing
    recomputed: Sequence[int] = (
        [every for every in RECOMPUTED if every <= shape.layers]
        if checkpointing == "auto"
        else [int(checkpointing)]
    )
    for resident in _residencies(recipe, strategy):
        yield from (Settings(resident, every) for every in recomputed)


def _residencies(recipe: Recipe, strategy: str) -> Sequence[bool]:
    keep_dequantized = recipe.model.resident_weights
    if not recipe.quantization.load_in_4bit:
        return [False]
    if keep_dequantized == "auto":
        return [False] if STRATEGIES[strategy].shards_layers else [True, False]
    return [keep_dequantized]


def _tokens_of_work(batches: BatchStatistics, tokens: int, settings: Settings, load: Load) -> float:
    """Time of an optimizer step, in tokens through one forward: forward, backward and what is recomputed."""
    passes = 2 + (1 / settings.activation_checkpoint_every if settings.activation_checkpoint_every else 0)
    dequantizations = 0 if settings.keep_dequantized or not load.load_in_4bit else passes
    each = _TOKENS_A_MICRO_BATCH + dequantizations * _TOKENS_A_DEQUANTIZATION
    return batches.step_tokens * passes + batches.count(tokens) * each


def _largest_budget(
    recipe: Recipe, memory: int, load: Load, settings: Settings, batches: BatchStatistics
) -> int | None:
    """Find the most tokens of a micro-batch that fit; None when the recipe's own, or the longest sample, does not."""

    def fits(tokens: int) -> bool:
        return memory_of(load, batches.packed(tokens), settings).reserved <= memory

    budget = recipe.batch.micro_batch_tokens
    if budget != "auto":
        return budget if fits(budget) else None
    low, high = batches.longest, max(batches.longest, min(batches.most_tokens, _most_tokens(load)))
    return _last(low, high, fits)


def _most_tokens(load: Load) -> int:
    return _MOST_VALUES // max(load.shape.intermediate, load.shape.hidden)


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The largest number from `low` to `high` for which `holds`, which holds up to some number; None: for none."""
    if not holds(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _layers_kept_whole(memory: int, load: Load, settings: Settings, packed: Packed) -> int:
    """Find how many layers fit beside the rest when they are not let go after each pass: that many gathers less."""
    if load.shares == 1:
        return 0
    limit = int(_KEPT_BELOW * memory)

    def fits(count: int) -> bool:
        return memory_of(load, packed, replace(settings, whole_layers=count)).reserved <= limit

    return _last(0, load.shape.layers, fits) or 0


def _evened_out(tokens: int, batches: BatchStatistics) -> int:
    """Find the smallest budget with as few micro-batches: they then hold about as much each."""
    count = batches.count(tokens)
    more = _last(batches.longest, tokens, lambda budget: batches.count(budget) > count)
    return batches.longest if more is None else min(tokens, more + 1)


def _cautious(recipe: Recipe, batches: BatchStatistics, load: Load | None, reason: str) -> ChosenSettings:
    """What needs little memory, whatever there is of it."""
    budget, every = recipe.batch.micro_batch_tokens, recipe.training.gradient_checkpointing
    tokens = CAUTIOUS_SAMPLES * batches.longest if budget == "auto" else budget
    resident = recipe.model.resident_weights is True and recipe.quantization.load_in_4bit
    settings = Settings(resident, 1 if every == "auto" else int(every))
    memory = memory_of(load, batches.packed(tokens), settings) if load else None
    return ChosenSettings(tokens, settings, memory, reason)


def _too_large(recipe: Recipe, memory: int, load: Load, batches: BatchStatistics) -> ChosenSettings:
    """Nothing fits, says the arithmetic: the least that the recipe allows, for the first micro-batch to decide."""
    least = _cautious(recipe, batches, load, "")
    budget = recipe.batch.micro_batch_tokens
    tokens = batches.longest if budget == "auto" else budget
    needed = memory_of(load, batches.packed(tokens), least.settings)
    reason = f"{gib(needed.reserved)} with CUDA's own do not fit {gib(memory)}"
    return ChosenSettings(tokens, least.settings, needed, reason, False)


# words ------------------------------------------------------------------------------------


def parse_gpu_memory(text: str, option: str = "--gpu-memory") -> int:
    """Return the bytes of `24GB`, `24` or `24 GiB`: a card's name and what it has are both counted in 2**30 bytes.

    Raises:
        ConfigError: it is not the size of a GPU that there could be; `option` is where it was said.
    """
    size = re.fullmatch(
        r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(?:G|GB|GiB)?\s*", text, re.IGNORECASE | re.ASCII
    )
    if size is None or not 1 <= float(size[1]) <= 10_000:
        raise ConfigError(
            f"{option}: {text[:60]!a} is not the memory of a GPU (1 to 10,000 GB); give that of one, for example 24GB"
        )
    return int(float(size[1]) * GIB)


def recomputation(every: int) -> str:
    """Say which decoder layers' activations the backward pass computes again."""
    ordinal = f"{every}{ {2: 'nd', 3: 'rd'}.get(every % 10 if every % 100 // 10 != 1 else 0, 'th') }"
    return {0: "none", 1: "all decoder layers"}.get(every, f"every {ordinal} decoder layer")
