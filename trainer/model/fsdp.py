"""fsdp: the frozen decoder layers are sharded over the processes (torch's FSDP2); the rest is replicated.

Replicated are the vision tower, embeddings and output head, which are not in 4 bits, and the adapters, whose gradients
the trainer adds up itself: so fsdp takes the steps of ddp.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


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
    replicated = {parameter for parameter in model.parameters() if not _is_sharded(parameter)}
    fully_shard(model, mesh=mesh, ignored_params=replicated)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor)


def mesh_of(world_size: int, device: torch.device) -> DeviceMesh:
    """Return the mesh of all processes in one row. A collective."""
    return init_device_mesh(device.type, (world_size,))
