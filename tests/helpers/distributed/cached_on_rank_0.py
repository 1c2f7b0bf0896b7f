"""Started by `accelerate launch`: `trainer.train` with vision features that rank 0 finds and rank 1 does not, from a
folder of its own: one runs its tower never, the other always."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState

from tests.helpers.foreign.fsdp_on_cpu import allow_fsdp_on_cpu
from trainer import train
from trainer.distributed.collectives import destroy_process_group, end_process
from trainer.logging_setup import setup_logging
from trainer.loop.trainer import PlannedTrainer

_close = train.close


def _tell(trainer: PlannedTrainer) -> None:
    """Write down how many images this rank needed, and for how many it ran the tower."""
    writer = trainer.features
    assert writer is not None
    Path(f"{os.environ['TOLD']}-{PartialState().process_index}.json").write_text(
        json.dumps([writer.needed, writer.computed])
    )
    _close(trainer)


def main() -> None:
    """Arguments: those of `trainer.train`. `TOLD`: where each rank tells what it did."""
    setup_logging()
    if os.environ["RANK"] == "1":
        os.environ["SAMESTEP_VISION_CACHE"] += "-of-rank-1"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        allow_fsdp_on_cpu()
    train.close = _tell
    options = train.parse(sys.argv[1:])
    index = train.prepare_first(options)
    train.train_once(options, index, train.init_process_group(), os.getppid())
    destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
