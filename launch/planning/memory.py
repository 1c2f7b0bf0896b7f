"""Bytes of one GPU while a base is loaded and while it trains: arithmetic on the model's shape, without torch.

Counted is what PyTorch's allocator hands out at its peak (`torch.cuda.max_memory_allocated`): the base, what is
trained, the activations that the backward pass needs, and the largest temporary. `reserved` adds what a card must have
beyond that. `benchmarks/memory.py` measures the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launch.planning.activations import largest_linear, training_peak
from launch.planning.memory_load import Load, Packed, Settings
from launch.strategies import STRATEGIES
from launch.units import GIB

CONTEXT_BYTES = 5 * GIB // 4  # the driver's share, CUDA's context, its libraries' kernels and workspaces
NCCL_BYTES = GIB // 2  # channels and buffers of a process group
FRAGMENTED_SHARE = 0.06  # of activations and temporaries, whose sizes change from one micro-batch to the next

_BLOCK = 64  # weights to a constant (bitsandbytes)
_BLOCKS_OF_CONSTANTS = 256  # constants to a constant of theirs
_LAYERS_UNDER_WAY = 4  # whole: that computes, what it was taken from, two on their way (`trainer.model.fsdp`)
_ZERO_BUCKET_BYTES = 4 * 50_000_000  # ds_configs: one flat buffer, allocated whole


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


def memory_of(load: Load, packed: Packed, settings: Settings) -> Memory:
    """Bytes of one GPU whose largest micro-batch is `packed`."""
    kept, temporary = training_peak(load, packed, settings)
    return Memory(
        base=_resident_bytes(load) if settings.keep_dequantized else _base_bytes(load, settings.whole_layers),
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


def _base_bytes(load: Load, whole_layers: int = 0) -> int:
    """Count the frozen base while it trains; of sharded layers some stay whole, and some are on their way."""
    layer, layers = load.shape.layer_weights, load.shape.layers
    count = min(layers, whole_layers + _LAYERS_UNDER_WAY) if load.shares > 1 else 0
    whole = count * _linear_bytes(load, layer)
    return _undivided_bytes(load) + layers * _linear_bytes(load, layer, load.shares) + whole


def _resident_bytes(load: Load) -> int:
    """The frozen base with its 4-bit weights held dequantized; in 8 bits those whose products are."""
    saved = load.fp8_layers * load.shape.layer_weights * (load.weight_bytes - 1)
    return _base_bytes(replace(load, load_in_4bit=False)) - saved


def _loading_bytes(load: Load) -> int:
    """Count the peak while loading: of layers that are shared out one is whole.

    The largest linear layer is there as it was read while it is quantized.
    """
    shape = load.shape
    layers = shape.layers * _linear_bytes(load, shape.layer_weights, load.shares)
    whole = _linear_bytes(load, shape.layer_weights) if load.shares > 1 else 0
    read = largest_linear(shape) * load.weight_bytes if load.load_in_4bit else 0
    return _undivided_bytes(load) + layers + whole + read


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
    """fp32 adapters, their gradients (twice where micro-batches are computed twice), what autocast keeps in half
    precision, and what the first step adds."""
    count, half = trained_parameters(load), 2 if load.activation_bytes == 2 else 0
    gradients = 4 + 4 * load.rechecked
    return count * (4 + gradients + half) + bytes_of_first_step(load.strategy, load.world_size, count)


def bytes_of_first_step(strategy: str, world_size: int, count: int) -> int:
    """What `count` trained weights need beside themselves and their gradients: two moments; buckets of a reduction."""
    engine = STRATEGIES[strategy].engine
    if engine == "deepspeed":
        shared = 8 + 4 + 4  # moments, DeepSpeed's own copy, its part of the gradients
        return count * shared // world_size + _ZERO_BUCKET_BYTES
    return count * (8 + (4 if engine == "ddp" else 0))
