"""Started by `accelerate launch`: evaluates a run with a rank 1 that cannot read its images, then honestly."""

import os
import sys
from typing import Any

import torch.distributed as dist

from launch.errors import RunError
from trainer.evaluation import generate
from trainer.generation import image_features


def unreadable(image: bytes) -> Any:
    """Fails on rank 1 only."""
    if os.environ["RANK"] == "1":
        raise RunError("an image cannot be read")
    return honest(image)


honest, end = image_features.decode_image, dist.destroy_process_group
# One launch can have one process group only: it must outlive the failed evaluation.
image_features.decode_image, dist.destroy_process_group = unreadable, lambda: None
sys.stdout.write(f"failed with {generate.main(sys.argv[1:])}\n")  # in one piece: both ranks write
sys.stdout.flush()
image_features.decode_image, dist.destroy_process_group = honest, end
sys.exit(generate.main(sys.argv[1:]))
