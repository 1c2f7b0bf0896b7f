"""The vision tower of the next step's first micro-batch, while the host looks at a step's sums and takes the step.

At that time the GPU would have nothing to do: some 6 ms, of 200 for a step of 4 samples. The tower is frozen, so its
features do not depend on the step. Under zero2 and zero3 DeepSpeed has taken the step by then.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel

from trainer.data.micro_batches import PackedBatch
from trainer.loop.dataloaders import to_device
from trainer.model.vision import with_tower_features


def tower_can_run_ahead(model: PeftModel) -> bool:
    """Return whether the tower is frozen. Under every strategy it is whole on each rank."""
    tower = cast(Any, model.get_base_model()).model.visual
    return not any(weight.requires_grad for weight in tower.parameters())


def run_tower(batch: PackedBatch, model: PeftModel, device: torch.device) -> PackedBatch:
    """Return a micro-batch on the device with the features of its images, which the GPU is given to compute.

    torch.OutOfMemoryError: there is no memory for it; the micro-batch is as it was.
    """
    inputs = with_tower_features(cast(Any, model.get_base_model()).model, to_device(batch["inputs"], device))
    return cast(PackedBatch, {**batch, "inputs": inputs})
