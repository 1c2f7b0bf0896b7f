"""Bytes of one GPU while a base is loaded and while it trains: arithmetic on the model's shape, without torch.

Counted is what PyTorch's allocator hands out at its peak (`torch.cuda.max_memory_allocated`): the base, what is
trained, the activations that the backward pass needs, and the largest temporary. `reserved` adds what a card must have
beyond that. Activations follow the tensors that autograd saves in transformers 5.23, bitsandbytes 0.50, PEFT 0.21 and
our dropout, or in `trainer.model.fused`; a test counts those of a layer. `benchmarks/memory.py` measures the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launch.inputs.model_shape import reached_tower_linears
from launch.strategies import STRATEGIES
from launch.units import GIB

if TYPE_CHECKING:
    from launch.inputs.model_shape import ModelShape
    from launch.recipe.schema import Recipe


CONTEXT_BYTES = 5 * GIB // 4  # the driver's share, CUDA's context, its libraries' kernels and workspaces
NCCL_BYTES = GIB // 2  # channels and buffers of a process group
FRAGMENTED_SHARE = 0.06  # of activations and temporaries, whose sizes change from one micro-batch to the next

_BLOCK = 64  # weights to a constant (bitsandbytes)
_BLOCKS_OF_CONSTANTS = 256  # constants to a constant of theirs
_ZERO_BUCKET_BYTES = 4 * 50_000_000  # ds_configs: one flat buffer, allocated whole
_HEAD_ROWS = 1024  # of logits at once (`trainer.model.head`)
# Bytes of a patch and channel of the tower at its peak. Plain: q and k in fp32, their products with cos and sin, beside
# q, k and v. Fused: a block's input and its norm, the MLP's inner values before and after GELU.
_TOWER_BYTES, _FUSED_TOWER_BYTES = {2: 34, 4: 44}, 20
_LARGEST_FUSED_RANK = 128  # of `trainer.model.kernels`


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
    by their paths; `dropout`: before them; `dora`: with lengths of rows; `fp8`: weights that are held for the products
    of the decoder layers are of 8 bits.
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
    fp8: bool = False

    @property
    def shares(self) -> int:
        """Processes that the decoder layers are cut over."""
        return self.world_size if STRATEGIES[self.strategy].shards_layers else 1


@dataclass(frozen=True)
class Packed:
    """The size of a micro-batch: all tokens, the visual ones among them, the scored ones."""

    tokens: int
    visual_tokens: int
    scored_tokens: int


@dataclass(frozen=True)
class Settings:
    """What trades memory for time and alters no number; `launch.planning.plan.PlannedSettings` adds why."""

    keep_dequantized: bool
    """4-bit weights are held dequantized, instead of being dequantized for every product."""
    activation_checkpoint_every: int
    """Every n-th decoder layer's activations are recomputed in the backward pass; 0: none."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. `base`: the frozen weights; `trained`: adapters, gradients, moments; `activations`,
    `temporary`: of the largest micro-batch; `loading`: the peak before training."""

    base: int
    trained: int
    activations: int
    temporary: int
    loading: int
    several_processes: bool

    @property
    def training(self) -> int:
        """The allocator's peak while training."""
        return self.base + self.trained + self.activations + self.temporary

    @property
    def peak(self) -> int:
        """The allocator's peak of the whole run."""
        return max(self.loading, self.training)

    @property
    def reserved(self) -> int:
        """What the card must have: the peak, what fragmentation costs, and what is not the allocator's."""
        outside = CONTEXT_BYTES + (NCCL_BYTES if self.several_processes else 0)
        fragmented = int(FRAGMENTED_SHARE * (self.activations + self.temporary))
        return max(self.loading, self.training + fragmented) + outside


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
        fp8=recipe.model.products == "fp8",
    )


def memory_of(load: Load, packed: Packed, settings: Settings) -> Memory:
    """Bytes of one GPU whose largest micro-batch is `packed`."""
    kept, temporary = _training_peak(load, packed, settings)
    return Memory(
        base=_resident_bytes(load) if settings.keep_dequantized else _base_bytes(load),
        trained=_trained_bytes(load),
        activations=kept,
        temporary=temporary,
        loading=_loading_bytes(load),
        several_processes=load.world_size > 1,
    )


# weights ----------------------------------------------------------------------------------


def _linear_bytes(load: Load, weights: int, shares: int = 1) -> int:
    """Frozen weights of linear layers, cut over `shares` processes; their constants are not cut."""
    if not load.load_in_4bit:
        return weights * load.weight_bytes // shares
    constants = weights // _BLOCK
    own = constants + 4 * constants // _BLOCKS_OF_CONSTANTS if load.double_quantized else 4 * constants
    return weights // 2 // shares + own


def _undivided_bytes(load: Load) -> int:
    """Vocabulary, vision tower, norms and biases: whole on every GPU."""
    shape = load.shape
    plain = (shape.vocabulary_weights + shape.other_weights) * load.weight_bytes
    return plain + _linear_bytes(load, shape.tower_weights)


def _base_bytes(load: Load) -> int:
    """Count the frozen base while it trains; of sharded layers the one that computes and the next are whole."""
    layer, layers = load.shape.layer_weights, load.shape.layers
    whole = 2 * _linear_bytes(load, layer) if load.shares > 1 else 0
    return _undivided_bytes(load) + layers * _linear_bytes(load, layer, load.shares) + whole


def _resident_bytes(load: Load) -> int:
    """The frozen base with its 4-bit weights held dequantized; in 8 bits those whose products are."""
    saved = load.shape.layers * load.shape.layer_weights * (load.weight_bytes - 1) if load.fp8 else 0
    return _base_bytes(replace(load, load_in_4bit=False)) - saved


def _loading_bytes(load: Load) -> int:
    """Count the peak while loading. fsdp cuts layer after layer; zero3 holds them all before it cuts, and after the
    trial of the largest micro-batch, when one more is on its way.

    The largest linear layer is there as it was read while it is quantized.
    """
    shape = load.shape
    shares = load.shares if STRATEGIES[load.strategy].shards_while_loading else 1
    layers = shape.layers * _linear_bytes(load, shape.layer_weights, shares)
    whole = _linear_bytes(load, shape.layer_weights) if load.shares > 1 else 0
    read = _largest_linear(shape) * load.weight_bytes if load.load_in_4bit else 0
    return _undivided_bytes(load) + layers + whole + read


def _largest_linear(shape: ModelShape) -> int:
    return max(outputs * inputs for outputs, inputs in shape.layer_linears.values())


def trained_parameters(load: Load) -> int:
    """Weights of all LoRA layers."""
    shape, lengths = load.shape, 1 if load.dora else 0
    linears = [(shape.layers, *shape.layer_linears[name]) for name in load.targets]
    tower = [shape.tower_linears[path] for path in load.tower_targets]
    linears += [(each.copies, each.outputs, each.inputs) for each in tower]
    return sum(
        copies * (load.lora_rank * (outputs + inputs) + lengths * outputs)
        for copies, outputs, inputs in linears
    )


def _trained_bytes(load: Load) -> int:
    """fp32 adapters and gradients, what autocast keeps in half precision, and what the first step adds."""
    count, half = trained_parameters(load), 2 if load.activation_bytes == 2 else 0
    return count * (4 + 4 + half) + bytes_of_first_step(load.strategy, load.world_size, count)


def bytes_of_first_step(strategy: str, world_size: int, count: int) -> int:
    """What `count` trained weights need beside themselves and their gradients: two moments; buckets of a reduction."""
    engine = STRATEGIES[strategy].engine
    if engine == "deepspeed":
        shared = 8 + 4 + 4  # moments, DeepSpeed's own copy, its part of the gradients
        return count * shared // world_size + _ZERO_BUCKET_BYTES
    return count * (8 + (4 if engine == "ddp" else 0))


# activations ------------------------------------------------------------------------------


def layer_activation_bytes(load: Load) -> int:
    """What autograd saves of one token in a decoder layer that is not recomputed.

    4-bit and frozen linear layers save nothing. Plain: each norm its input in fp32, SiLU its input, the product both
    factors; the attention its four tensors; a LoRA its dropped-out input with a byte of mask a value. RoPE saves only
    cos and sin, the same for all layers.
    """
    shape, size = load.shape, load.activation_bytes
    norms = 2 * shape.hidden * (size if load.kernels.fused else 4)
    if shape.query_norm:  # transformers' own in both ways: its input in fp32, the factor of each head
        norms += 4 * (shape.query_width + shape.kv_width + shape.heads + shape.kv_heads)
    attention = size * (2 * shape.query_width + 2 * shape.kv_width) + 4 * shape.heads
    product = size * shape.intermediate * (2 if load.kernels.fused else 3)
    return norms + attention + product + _lora_bytes(load) + 2 * 4


def _lora_bytes(load: Load) -> int:
    shape, size = load.shape, load.activation_bytes
    rank, fused = load.lora_rank, load.kernels.fused_lora and load.lora_rank <= _LARGEST_FUSED_RANK
    thin = size * len(load.targets) * rank
    if load.dora:  # PEFT's own forward: the base's output, LoRA's, and the input in fp32
        fused = False
        thin += sum(2 * 4 * shape.layer_linears[name][0] for name in load.targets)
    if load.dropout and not fused:
        return thin + (1 + size) * sum(shape.layer_linears[name][1] for name in load.targets)
    # Undropped, or dropped within the kernel: layers that are fed alike save one input, o_proj's is the attention's.
    fed = {
        ("q_proj", "k_proj", "v_proj"): shape.hidden,
        ("gate_proj", "up_proj"): shape.hidden,
        ("down_proj",): shape.intermediate,
    }
    return thin + size * sum(width for names, width in fed.items() if set(names) & set(load.targets))


def _training_peak(load: Load, packed: Packed, settings: Settings) -> tuple[int, int]:
    """(activations, temporaries) at the moment they take most: in a layer's backward, the head's or the tower."""
    shape, size, tokens = load.shape, load.activation_bytes, packed.tokens
    patches = packed.visual_tokens * shape.patches_per_token
    held = _held_bytes(load, packed, patches)
    kept = [_is_recomputed(number, settings.activation_checkpoint_every) for number in range(shape.layers)]
    one, own_input = layer_activation_bytes(load) * tokens, size * shape.hidden * tokens
    before, peak = 0, 0
    for recomputed in kept:
        # The fused norm saves the layer's input itself, which recomputation has kept.
        again = own_input if recomputed and not load.kernels.fused else 0
        peak = max(peak, before + one + again)
        before += own_input if recomputed else one
    head_rows = min(packed.scored_tokens, _HEAD_ROWS)
    logits = 8 * head_rows * shape.vocabulary  # in fp32, and what is made of them
    head = logits + packed.scored_tokens * shape.hidden * (4 + size) + own_input
    tower = patches * shape.vision_width * (_FUSED_TOWER_BYTES if load.kernels.fused else _TOWER_BYTES[size])
    moments = (
        (held + peak, _layer_temporaries(load, tokens, settings)),
        (held + before, head),
        (held, tower + tokens * size * shape.hidden),
    )
    return max(moments, key=sum)


def _is_recomputed(number: int, every: int) -> bool:
    """As transformers' `activation_checkpointing_enable` counts layers."""
    return every > 0 and number % every == 0


def _held_bytes(load: Load, packed: Packed, patches: int) -> int:
    """What a whole micro-batch holds beside its layers: pixels, positions, dropout keys, cos and sin, the last norm,
    features that enter decoder layers."""
    shape = load.shape
    keys = 8 * len(load.targets) * shape.layers if load.dropout else 0
    rotation = 2 * load.activation_bytes * shape.head_width
    last_norm = shape.hidden * (load.activation_bytes if load.kernels.fused else 4)
    deepstack = packed.visual_tokens * shape.deepstack * shape.hidden * load.weight_bytes
    pixels = patches * (load.weight_bytes * shape.patch_values + 16)
    kept = pixels + deepstack + _trained_tower_bytes(load, patches)
    return kept + packed.tokens * (keys + rotation + last_norm + 6 * 8)


def _trained_tower_bytes(load: Load, patches: int) -> int:
    """What autograd saves of a tower with LoRA, whose forwards are transformers' own, until the backward pass ends.

    A block as a decoder layer: norms, attention, MLP; blocks count where one has LoRA, mergers always. The inputs of
    its LoRA are in fp32, and dropout keeps a byte a value and its keys.
    """
    if not load.tower_targets:
        return 0
    shape, size = load.shape, load.activation_bytes
    width, inner = shape.vision_width, shape.vision_intermediate
    gated = shape.vision_gated
    norms = 2 * width * (4 if gated else size)
    block = norms + 4 * width * size + 4 + size * inner * (3 if gated else 1)
    in_blocks = any(path.startswith("blocks.") for path in load.tower_targets)
    kept = shape.vision_blocks * block if in_blocks else 0
    kept += (1 + shape.deepstack) * 2 * size * width
    lora = 0
    for path in load.tower_targets:
        linear = shape.tower_linears[path]
        share = 1 if path.startswith("blocks.") else shape.patches_per_token
        lora += linear.copies * (linear.inputs * (5 if load.dropout else 4) + 4 * load.lora_rank + 8) // share
    return patches * (kept + lora)


def _layer_temporaries(load: Load, tokens: int, settings: Settings) -> int:
    """The most that a layer's backward has besides what was saved: gradients of its MLP or its attention, and the
    weight that is dequantized for one product."""
    shape, size = load.shape, load.activation_bytes
    fused = load.kernels.fused
    inner = size * shape.intermediate * tokens
    weight = _largest_linear(shape) * size if load.load_in_4bit and not settings.keep_dequantized else 0
    product = max(inner + weight, inner if fused else 3 * inner)
    if load.dora:  # PEFT's `get_lora_weight`: an identity matrix in fp32, and the change of the weight
        squares = (shape.layer_linears[name] for name in load.targets)
        weight += max(4 * inputs * (inputs + 3 * outputs) for outputs, inputs in squares)
        product = max(product, inner + weight)
    attention = tokens * max(shape.hidden, shape.query_width) * (6 * size if fused else 12)
    return max(product, attention) + 2 * size * shape.hidden * tokens
