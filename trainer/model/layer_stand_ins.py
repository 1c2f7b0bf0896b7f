"""Decoder layers without their weights, for the trial of a micro-batch: as much memory as sharded, no word to a rank.

A rank that runs out of memory between the collectives of FSDP or ZeRO leaves the others waiting for ever. So the trial
has none: every layer computes with the same zeros in the shape of its weights, while its own stay as they are shared
out. No library that shards takes part, and none has to be brought back to order after an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

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


def frozen_weights(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Return all weights of a layer but its adapters."""
    return (weight for weight in layer.parameters() if not weight.requires_grad)
