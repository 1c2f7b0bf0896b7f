"""DDP, FSDP and FSDP1 checkpoints of plain library code, and what they must hold.

Every rank calls `write`; `tests.helpers.foreign.launching` starts them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from tests.helpers.foreign.fsdp_on_cpu import allow_fsdp_on_cpu
from tests.helpers.foreign.training import STEPS, train


def whole(value: Any) -> Tensor:
    tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return torch.as_tensor(tensor).detach().float().cpu().clone()


def write_truth(trainer: Trainer, folder: Path) -> None:
    """What the model and the optimizer hold in memory, by parameter name, gathered by torch itself."""
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    state = trainer.optimizer.optimizer.state
    tensors = {name: whole(p) for name, p in named.items()}
    tensors |= {
        f"{name}.{key}": whole(state[p][key])
        for name, p in named.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    if trainer.args.process_index == 0:
        save_file(tensors, folder / "truth.safetensors")


def fsdp(version: int, form: str) -> dict[str, Any]:
    layers = ["Qwen2VLDecoderLayer", "Qwen2VLVisionBlock"]
    config = {"version": version, "state_dict_type": form, "transformer_layer_cls_to_wrap": layers}
    if version == 1:
        config["sync_module_states"] = False  # accelerate 1.15 asks for a GPU to do it
    return {"fsdp": True, "fsdp_config": config}


def write(base: str, output: Path) -> None:
    """Train and save, engine by engine."""
    write_truth(train(base, output / "ddp"), output / "ddp")
    allow_fsdp_on_cpu()
    for name, version, form in (
        ("fsdp_sharded", 2, "SHARDED_STATE_DICT"),
        ("fsdp_full", 2, "FULL_STATE_DICT"),
        ("fsdp1_sharded", 1, "SHARDED_STATE_DICT"),
    ):
        trainer = train(base, output / name, **fsdp(version, form))
        if version == 2:
            write_truth(trainer, output / name)
    shards = output / "fsdp_sharded" / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0"
    merge_fsdp_weights(
        str(shards), str(output / "merge_weights")
    )  # `accelerate merge-weights`; every rank waits in it
    torch.distributed.destroy_process_group()
