"""The vision tower of the next step's first micro-batch, while the host looks at a step's sums and takes the step.

At that time the GPU would have nothing to do: some 6 ms, of 200 for a step of 4 samples. The tower is frozen, so its
features do not depend on the step. Under zero2 and zero3 DeepSpeed has taken the step by then. The pixels, or cached
features, are copied while the GPU still computes the backward pass: 210 MB of 32 samples, 4 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from trainer.data.micro_batches import PackedBatch
from trainer.loop.dataloaders import to_device
from trainer.model.vision import with_tower_features


def tower_can_run_ahead(model: PeftModel) -> bool:
    """Return whether the tower is frozen. Under every strategy it is whole on each rank."""
    tower = cast(Any, model.get_base_model()).model.visual
    return not any(weight.requires_grad for weight in tower.parameters())


def run_tower(
    batch: PackedBatch, model: PeftModel, device: torch.device, *, while_caching: bool = False
) -> PackedBatch:
    """Return a micro-batch on the device with the features of its images, which the GPU is given to compute.

    `while_caching`: one that has images to compute is left as it was packed, because their features can still come
    into the cache.

    torch.OutOfMemoryError: there is no memory for it; the micro-batch is as it was.
    """
    if while_caching and batch["inputs"]["fresh_grids"]:
        return batch
    inputs = with_tower_features(cast(Any, model.get_base_model()).model, copy_ahead(batch["inputs"], device))
    return cast(PackedBatch, {**batch, "inputs": inputs})


def copy_ahead(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `to_device`'s copies, which begin at once: what the GPU is given from here on alone waits for them.

    `record_stream`: what is freed while the GPU has yet to read it is not written over by a later copy.
    """
    if device.type != "cuda":
        return to_device(inputs, device)
    computing, copying = torch.cuda.current_stream(device), _copying(device)
    with torch.cuda.stream(copying):
        copies = to_device(inputs, device)
    computing.wait_stream(copying)
    for each in copies.values():
        if isinstance(each, Tensor):
            each.record_stream(computing)
    return copies


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
