"""Started by `accelerate launch`: a run whose disk is full in the save of step 2, which rank 0 alone sees, then one
whose loss becomes NaN on rank 1 alone in step 2."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

from launch.errors import SamestepError
from trainer import sft, train
from trainer.agreement import end_process
from trainer.sft import PlannedTrainer

_loss, _publish = PlannedTrainer._loss, sft.publish


def _poisoned(self: PlannedTrainer, model: Any, inputs: Any) -> Any:
    loss = _loss(self, model, inputs)
    return loss * float("nan") if os.environ["RANK"] == "1" and inputs["step"] == 1 else loss


def _full(aside: Path, final: Path, *args: Any, **kwargs: Any) -> None:
    if final.name == "checkpoint-2":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))
    _publish(aside, final, *args, **kwargs)


def main() -> int:
    """Arguments: those of `trainer.train`; the first run is called `full`."""
    options = train.parse([*sys.argv[1:], "--name", "full"])
    index, state = train.prepare_first(options), train.start_processes()
    sft.publish = _full
    try:
        train.train_once(options, index, state, os.getppid())
    except SamestepError as error:
        sys.stdout.write(f"rank {state.process_index} ended with: {error}\n")
        sys.stdout.flush()
    sft.publish = _publish
    PlannedTrainer._loss = _poisoned  # type: ignore[method-assign]
    return train.main()


if __name__ == "__main__":
    end_process(main())
