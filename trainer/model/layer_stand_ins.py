"""Decoder layers without their weights, for the trial of a micro-batch: as much memory as sharded, no word to a rank.

A rank that runs out of memory between the collectives of FSDP or ZeRO leaves the others waiting for ever. So the trial
has none: every layer computes with the same zeros in the shape of its weights, while its own stay as they are shared
out. No library that shards takes part, and none has to be brought back to order after an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from launch.errors import RunError
from trainer.distributed.collectives import run_on_all_ranks

_SLICE = 4 * 2**20


def decoder_layers(model: PeftModel) -> nn.ModuleList:
    """Return the layers of the language model, which fsdp and zero3 share out."""
    return cast(nn.ModuleList, cast(Any, model.get_base_model()).model.language_model.layers)


def layer_bytes(layer: nn.Module) -> int:
    """Return the bytes of the frozen weights of a layer when it is whole; its quantization constants never leave."""
    return sum(weight.numel() * weight.element_size() for weight in frozen_weights(layer))


@contextmanager
def zero_weight_layers(model: PeftModel, device: torch.device) -> Iterator[None]:
    """Let all layers compute with the same zeros inside the block, and hide their calls from FSDP2. No collectives."""
    zeros: dict[tuple[str, str, torch.Size], Tensor] = {}
    own: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    hooked: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in hooked]
    try:
        for layer in decoder_layers(model):
            for path, module in layer.named_modules():
                for name, weight in list(module._parameters.items()):
                    if weight is None or weight.requires_grad:
                        continue
                    key = (path, name, weight.shape)  # a DTensor's is that of the whole
                    if key not in zeros:
                        zeros[key] = torch.zeros(key[2], dtype=weight.dtype, device=device)
                    own.append((module._parameters, name, weight))
                    module._parameters[name] = nn.Parameter(zeros[key], requires_grad=False)
        for module in hooked:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after
        for parameters, name, weight in own:
            parameters[name] = weight


@dataclass(frozen=True)
class _Cut:
    """A weight that is away: `share` of its bytes is here, `sums` are of every rank's share."""

    weight: nn.Parameter
    share: Tensor
    sums: Tensor


@contextmanager
def temporarily_sharded(model: PeftModel) -> Iterator[None]:
    """Let a rank hold its share of the decoder layers' frozen weights inside the block, as it will with ZeRO-3; their
    shapes stay.

    Before and afterwards it has them whole. They come back layer by layer, so that never more than one is there beside
    the shares of those after it. A collective, around what fails on all ranks or on none.

    Raises:
        RunError: on all ranks: their bytes have changed.
    """
    if dist.get_world_size() == 1:
        yield
        return
    away = run_on_all_ranks(
        lambda: [[_cut(weight) for weight in frozen_weights(layer)] for layer in decoder_layers(model)]
    )
    yield
    for cuts in away:
        wholes = run_on_all_ranks(partial(_room_for, cuts))
        for cut, whole in zip(cuts, wholes, strict=True):
            dist.all_gather_into_tensor(whole, cut.share)
        run_on_all_ranks(partial(_check, cuts, wholes))
        for cut, whole in zip(cuts, wholes, strict=True):
            weight = cut.weight
            size = weight.numel() * weight.element_size()
            weight.data = whole[:size].view(weight.dtype).view(weight.shape)
        cuts.clear()


def _cut(weight: nn.Parameter) -> _Cut:
    """Leave a weight its shape alone; this rank's share of its bytes is kept, the last ones padded."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    whole = weight.data.contiguous().view(-1).view(torch.uint8)
    size = -(-len(whole) // ranks)
    shares = [whole[at * size : (at + 1) * size] for at in range(ranks)]
    share = whole.new_zeros(size)
    share[: len(shares[rank])] = shares[rank]
    sums = torch.stack([_sum(each) for each in shares])
    weight.data = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return _Cut(weight, share, sums)


def _room_for(cuts: Sequence[_Cut]) -> list[Tensor]:
    return [cut.share.new_empty(dist.get_world_size() * len(cut.share)) for cut in cuts]


def _check(cuts: Sequence[_Cut], wholes: Sequence[Tensor]) -> None:
    found = [
        torch.stack([_sum(each) for each in whole.view(-1, len(cut.share))])
        for cut, whole in zip(cuts, wholes, strict=True)
    ]
    if not torch.equal(torch.cat(found), torch.cat([cut.sums for cut in cuts])):
        raise RunError(
            "model: the decoder layers are not what they were before the largest micro-batch was tried; "
            "install the versions of constraints.txt, or use another --strategy"
        )


def _sum(numbers: Tensor) -> Tensor:
    """Of bytes [n]: int64. In slices, each of which PyTorch first makes eight times as large."""
    slices = [part.sum(dtype=torch.int64) for part in numbers.split(_SLICE)]
    return torch.stack(slices).sum()


def frozen_weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Return all weights of a layer but its adapters."""
    return (weight for weight in layer.parameters() if not weight.requires_grad)
