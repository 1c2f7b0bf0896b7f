"""Checks of what sharding could do without an error: change bytes, change outputs, or not shard at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch.errors import RunError
from trainer.checks.training import output_tolerance
from trainer.distributed.collectives import run_on_all_ranks
from trainer.model.attention import Segments
from trainer.model.layer_stand_ins import decoder_layers, frozen_weights

_LENGTHS = (8191, 8179)  # primes: no width of a layer is a multiple
RESIDENT_MARGIN = 0.05  # padding, and what is cut unevenly


@dataclass(frozen=True)
class LayerReference:
    """What a whole decoder layer is, to be held against its shards.

    `packed`: checksum of the packed bytes by module, int64 [2]; `output`: on a fixed input; `bytes`: of the weights;
    `constants`: bytes of the quantization constants, which stay whole on every rank. Tensors are where the layer is:
    the host waits for none of them before they are compared.
    """

    packed: Mapping[str, Tensor]
    output: Tensor
    bytes: int
    constants: int = 0


@torch.no_grad()
def reference_layer(layer: nn.Module) -> LayerReference:
    """Compute the reference of a whole layer on this device, right after quantization or while it is gathered."""
    packed = {name: _checksum(weight) for name, weight in _packed_weights(layer)}
    size = sum(parameter.nbytes for parameter in frozen_weights(layer))
    return LayerReference(packed, _output(layer), size, _constants(layer))


def check_sharding(model: PeftModel, whole: Sequence[LayerReference], world_size: int) -> None:
    """Gather every layer once: same packed bytes, same output as before it was sharded; and it is really sharded.

    A collective. FSDP2 with `bfloat16` storage rewrites bytes that look like NaN on a GPU (torch 2.11), and leaves
    `uint8` storage whole on every rank (accelerate 1.15), both without an error.

    Raises:
        RunError: on all ranks.
    """
    local, gathered = [], []
    for layer in decoder_layers(model):
        local.append(resident_bytes(layer))
        with _gathered(layer):
            gathered.append(reference_layer(layer))

    def compare() -> None:
        for number, facts in enumerate(zip(whole, gathered, local, strict=True)):
            _compare_layer(number, *facts, world_size)

    run_on_all_ranks(compare)


def resident_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's frozen weights on this rank: its share of sharded ones, constants included."""
    return sum(_local_bytes(parameter) for parameter in frozen_weights(layer)) + _constants(layer)


def whole_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's frozen weights over all ranks, constants included."""
    return sum(weight.numel() * weight.element_size() for weight in frozen_weights(layer)) + _constants(layer)


@contextmanager
def _gathered(layer: Any) -> Iterator[None]:
    layer.unshard()
    yield
    layer.reshard()


def _compare_layer(
    number: int, before: LayerReference, after: LayerReference, local: int, world_size: int
) -> None:
    there = after.packed
    if changed := sorted(
        name
        for name, sums in before.packed.items()
        if name not in there or not torch.equal(sums, there[name])
    ):
        raise RunError(
            f"model: sharding changed the packed 4-bit bytes of decoder layer {number} ({len(changed)} of "
            f"{len(before.packed)} weights, such as {changed[0]}); use float16 or float32 storage, or --strategy ddp"
        )
    apart = (before.output.float() - after.output.float()).abs().max().item()
    size = max(1.0, before.output.float().abs().max().item())  # one rounding of bfloat16 at 2 to 4 is 0.0156
    if not apart <= size * output_tolerance(before.output.dtype):
        raise RunError(
            f"model: decoder layer {number} computes otherwise after it was sharded (largest difference {apart:.3g}); "
            "install the versions of constraints.txt, or use --strategy ddp"
        )
    limit = (1 / world_size + RESIDENT_MARGIN) * before.bytes + before.constants
    if world_size > 1 and local > limit:
        raise RunError(
            f"model: decoder layer {number} is not sharded: {local:,} of its {before.bytes:,} bytes are resident, at "
            f"most {limit:,.0f} may be on {world_size} processes; use --strategy ddp"
        )


def _packed_weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in layer.named_modules():
        if isinstance(module, Linear4bit):
            yield name.removesuffix(".base_layer"), module.weight  # PEFT's name for what it wraps


def _checksum(weight: Tensor) -> Tensor:
    """Return int64 [2] of a tensor's bytes, on its device: sums over every 8191st and 8179th word, mixed.

    In whole numbers, so exact in any order. A word that is changed or moved changes both.
    """
    values = weight.detach().contiguous().view(torch.uint8).reshape(-1)
    words = nn.functional.pad(values, (0, -len(values) % 4)).view(torch.int32)
    sums = []
    for length in _LENGTHS:
        columns = (
            nn.functional.pad(words, (0, -len(words) % length)).view(-1, length).sum(0, dtype=torch.int64)
        )
        sums.append((columns * _factors(length, columns.device)).sum())
    return torch.stack(sums)


@cache
def _factors(length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return (torch.randint(-(2**62), 2**62, (length,), generator=generator) * 2 + 1).to(device)


def _constants(layer: nn.Module) -> int:
    """Count the bytes of the quantization constants, which stay whole on every rank, without the small code tables."""
    states = [
        getattr(module, "quant_state", None) for module in layer.modules() if isinstance(module, Linear4bit)
    ]
    quantized = [state for state in states if state is not None]
    nested = [state.state2 for state in quantized if getattr(state, "state2", None) is not None]
    return sum(state.absmax.nbytes for state in (*quantized, *nested))


def _local_bytes(parameter: nn.Parameter) -> int:
    return parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes


def _output(layer: nn.Module) -> Tensor:
    """Compute the layer's output on 8 tokens of fixed random numbers without positions."""
    attention: Any = layer.self_attn
    width: Any = layer.hidden_size
    parameter = layer.input_layernorm.weight  # type: ignore[union-attr]
    device, dtype = cast(Tensor, parameter).device, cast(Tensor, parameter).dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, width, generator=generator).to(device, dtype)
    cos = torch.ones(1, 8, attention.head_dim, device=device, dtype=dtype)
    whole = Segments(torch.tensor([0, 8], dtype=torch.int32, device=device), (8,))
    was_training = layer.training
    layer.eval()
    # Not `layer(...)`: FSDP2's hook would take a layer that is called alone for the root of the model.
    output: Tensor = cast(Any, layer).forward(
        hidden, position_embeddings=(cos, torch.zeros_like(cos)), segments=whole
    )
    layer.train(was_training)
    return output
