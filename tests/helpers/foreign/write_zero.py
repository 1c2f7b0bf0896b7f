"""ZeRO-2 and ZeRO-3 checkpoints of plain library code, and what they must hold.

Every rank calls `write`; `tests.helpers.foreign.launching` starts them.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from tests.helpers.foreign.training import STEPS, train


def whole(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone()


def write_truth(trainer: Trainer, folder: Path) -> None:
    """What the engine holds, by parameter name, gathered by DeepSpeed itself."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        with (
            deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else torch.no_grad()
        ):
            tensors[name] = whole(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{key}"] = whole(safe_get_full_optimizer_state(parameter, key))
    if trainer.args.process_index == 0:
        save_file(tensors, folder / "truth.safetensors")


def settings(stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 1_000_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 100_000}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def convert(checkpoint: Path) -> None:
    """As `ds_to_universal --inject_missing_state` and `zero_to_fp32.py` do it."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint / f"global_step{STEPS}"),
            output_folder=str(checkpoint / f"global_step{STEPS}_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(checkpoint.parent / "zero_to_fp32"))


def write(base: str, output: Path) -> None:
    """Train and save, engine by engine."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # It would compile for a minute what inference alone uses.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    for stage in (2, 3):
        folder = output / f"zero{stage}"
        write_truth(train(base, folder, use_cpu=False, deepspeed=settings(stage)), folder)
        if torch.distributed.get_rank() == 0:
            convert(folder / f"checkpoint-{STEPS}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
