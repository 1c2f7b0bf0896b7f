"""Started by `accelerate launch`: runs with which something is wrong on one rank alone.

`unreadable`: rank 1 cannot read the data before the model is wrapped. `full`: the disk is full in the save of step 2,
which rank 0 sees. `later`: rank 1 runs out of memory in step 3, once; `tried`: it does with all its samples in one
micro-batch, tried before the first step; `fixed` is planned as that ended; `broken` fails otherwise when that is tried.
The last one's loss becomes NaN on rank 1 in step 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from launch.errors import RunError, SamestepError
from launch.planning.plan import Plan
from trainer import train
from trainer.checkpoint import saver
from trainer.distributed.collectives import end_process
from trainer.loop import dataloaders, oom_trial
from trainer.loop.trainer import PlannedTrainer

_loss, _publish, _assemble = PlannedTrainer.micro_batch_loss, saver.publish, dataloaders.assemble
_full_once = {"later"}


def _poisoned(self: PlannedTrainer, model: Any, inputs: Any) -> Any:
    loss = _loss(self, model, inputs)
    return loss * float("nan") if os.environ["RANK"] == "1" and inputs["step"] == 1 else loss


def _out_of_memory(self: PlannedTrainer, model: Any, inputs: Any) -> Any:
    """As PyTorch raises it, in the middle of the forward."""
    loss, name = _loss(self, model, inputs), self.run_directory.name
    if os.environ["RANK"] == "1" and torch.is_grad_enabled():
        if name == "broken":
            raise RunError("the trial fails")
        later = inputs["step"] == 2 and name in _full_once
        if later or (name == "tried" and self.plan.micro_batches == 1):
            _full_once.discard(name)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has ...")
    return loss


def _full(aside: Path, final: Path, *args: Any, **kwargs: Any) -> None:
    if final.name == "checkpoint-2":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))
    _publish(aside, final, *args, **kwargs)


def _unreadable(*args: Any, **kwargs: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise OSError(errno.EIO, os.strerror(errno.EIO), "charts.parquet")
    return _assemble(*args, **kwargs)


def train_named(name: str, state: PartialState, *more: str) -> argparse.Namespace:
    """One attempt at a run; says how it ended badly."""
    options = train.parse([*sys.argv[1:], "--name", name, *more])
    try:
        train.train_once(options, train.prepare_first(options), state, os.getppid())
    except SamestepError as error:
        sys.stdout.write(f"{name}: rank {state.process_index} ended with: {error}\n")
        sys.stdout.flush()
    return options


def main() -> int:
    """Arguments: those of `trainer.train`."""
    train.prepare_first(train.parse(sys.argv[1:]))
    state = train.init_process_group()
    dataloaders.assemble = _unreadable
    train_named("unreadable", state)
    dataloaders.assemble = _assemble
    saver.publish = _full
    train_named("full", state)
    saver.publish = _publish
    PlannedTrainer.micro_batch_loss = _out_of_memory  # type: ignore[method-assign]
    train_named("later", state)
    train_named("later", state)
    oom_trial.DEVICES = ("cpu",)
    runs = train_named("tried", state).runs_dir
    train_named("broken", state)
    oom_trial.DEVICES = ()
    plan = Plan.from_json((runs / "tried" / "plan.json").read_text())
    train_named("fixed", state, "--set", f"batch.micro_batch_tokens={plan.micro_batch_tokens}")
    PlannedTrainer.micro_batch_loss = _poisoned  # type: ignore[method-assign]
    return train.main()


if __name__ == "__main__":
    end_process(main())
