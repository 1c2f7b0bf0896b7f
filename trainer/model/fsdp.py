"""fsdp, zero3: the frozen decoder layers are sharded over the processes (torch's FSDP2); the rest is replicated.

Replicated are the vision tower, embeddings and output head, which are not in 4 bits, and the adapters, whose gradients
the trainer adds up itself: so fsdp takes the steps of ddp. Under zero3 DeepSpeed takes the adapters
(`trainer.engine.zero`).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer.model.layer_stand_ins import decoder_layers

_AHEAD = 2  # layers under way while one computes: `launch.planning.memory` counts them


def shard_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's share of a layer's parameters; they come together while the layer computes."""
    packed = [
        (module, module.weight.compress_statistics, module.weight.quant_type)
        for module in layer.modules()
        if isinstance(module, Linear4bit)
    ]
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for module, compress_statistics, quant_type in packed:  # PEFT 0.21 asks the weight (`dispatch_bnb_4bit`)
        module.weight.compress_statistics, module.weight.quant_type = compress_statistics, quant_type


def close_sharding(model: PeftModel, mesh: DeviceMesh) -> None:
    """Make the model the root over its sharded layers: everything outside them, and the adapters, stays replicated.

    accelerate keeps a model as it is that FSDP2 has wrapped (`fsdp2_prepare_model`, 1.15).
    """
    # torch 2.14 warns of every layer whose output is a view, which a write in place would detach from its gathers.
    # Nothing writes into a layer's output: residuals are added into tensors of their own.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    replicated = {parameter for parameter in model.parameters() if not _is_sharded(parameter)}
    fully_shard(model, mesh=mesh, ignored_params=replicated)


def schedule_gathers(model: PeftModel, whole_layers: int) -> None:
    """Have layers gathered while those before them compute, and keep `whole_layers` of them whole once they are.

    Their weights are frozen, so what was gathered once is right for ever. Kept layers lie evenly among the others: what
    is gathered has the more computation to hide behind. Before the first step; may be called again.
    """
    layers: list[Any] = list(decoder_layers(model))
    kept = {number * len(layers) // whole_layers for number in range(whole_layers)}
    gathered = [number for number in range(len(layers)) if number not in kept]
    root: Any = model
    root.set_modules_to_forward_prefetch([layers[number] for number in gathered[:_AHEAD]])
    for number, layer in enumerate(layers):
        following = [layers[other] for other in gathered if other > number][:_AHEAD]
        preceding = [layers[other] for other in reversed(gathered) if other < number][:_AHEAD]
        layer.set_modules_to_forward_prefetch(following)
        layer.set_modules_to_backward_prefetch(preceding)
        # The last one's backward follows its forward: to let it go between the two saves no memory.
        stays = number in kept or number == len(layers) - 1
        layer.set_reshard_after_forward(not stays, recurse=False)
        layer.set_reshard_after_backward(number not in kept, recurse=False)


def gather_from_here(model: PeftModel) -> None:
    """Let the next forward gather its first layers beside what the GPU is given from now on, not behind it.

    FSDP2 lets its first gathers wait for all that the GPU was given before the forward, because a step could have
    changed what they read. What is gathered here is frozen.
    """
    if torch.cuda.is_available():
        root: Any = model
        root.set_post_optim_event(torch.cuda.current_stream().record_event())


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor)


def mesh_of(world_size: int, device: torch.device) -> DeviceMesh:
    """Return the mesh of all processes in one row. A collective."""
    return init_device_mesh(device.type, (world_size,))
