"""Started by `accelerate launch` in the place of `trainer.train`: ranks that share one GPU and its memory.

    -m benchmarks.capped_train arguments of trainer.train ...

Prints each rank's peak.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import PartialState

from trainer import train
from trainer.distributed import process_group
from trainer.distributed.collectives import end_process


def share_one_gpu() -> None:
    """Ranks without `OWN_GPUS`: gloo carries CUDA tensors where NCCL wants a GPU for each rank."""
    os.environ["LOCAL_RANK"] = "0"

    def start() -> PartialState:
        process_group.find_deepspeed_config()
        return PartialState(backend="gloo", timeout=process_group.PROCESS_GROUP_TIMEOUT)

    train.init_process_group = start


def cap_memory() -> None:
    """`CAP_GIB`: the most that each rank may take of its GPU's memory; its plan is not told."""
    if cap := os.environ.get("CAP_GIB"):
        device = int(os.environ.get("LOCAL_RANK", "0"))
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(float(cap) * 2**30 / total, device)


def main() -> None:
    """Train with what follows on the command line."""
    share_one_gpu()
    cap_memory()
    status = train.main()
    rank, peak = os.environ.get("RANK", "0"), torch.cuda.max_memory_allocated() / 2**30
    sys.stdout.write(f"rank {rank}: peak {peak:.2f} GiB\n")
    end_process(status)


if __name__ == "__main__":
    main()
