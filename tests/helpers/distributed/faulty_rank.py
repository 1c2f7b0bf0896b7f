"""Started by `accelerate launch`: runs of one recipe in which rank 1 may compute wrongly, or run out of memory.

Arguments: the recipe, the folder of the runs, and their names. `off`: nothing is computed twice, in all others
everything is. `weight`: from step 3 on one value that rank 1's language model gives out is wrong; `once`: in step 2
alone, and not where it computes another rank's micro-batch; `full`: it has no memory for its own in step 3.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.errors import SamestepError
from tests.helpers.foreign.fsdp_on_cpu import allow_fsdp_on_cpu
from trainer import train
from trainer.distributed.collectives import destroy_process_group, end_process
from trainer.loop.trainer import PlannedTrainer

_compute_own, _loss = PlannedTrainer._compute_micro_batch, PlannedTrainer.micro_batch_loss
_inside_own: list[bool] = []


def _own(self: PlannedTrainer, *args: Any) -> Any:
    _inside_own.append(True)
    try:
        return _compute_own(self, *args)
    finally:
        _inside_own.pop()


def _with_fault(self: PlannedTrainer, model: Any, batch: Any) -> Any:
    name, step, own = self.run_directory.name, batch["step"] + 1, bool(_inside_own)
    if os.environ.get("RANK", "1") != "1" or not torch.is_grad_enabled():
        return _loss(self, model, batch)
    if name == "full" and own and step == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has ...")
    if not (name == "weight" and step >= 3) and not (name == "once" and own and step == 2):
        return _loss(self, model, batch)

    def flip(_: Any, __: Any, output: Any) -> Any:
        wrong = output.clone()
        wrong[..., 0] = -2 * wrong[..., 0]
        return wrong

    handle = self.model.get_base_model().model.language_model.norm.register_forward_hook(flip)
    try:
        return _loss(self, model, batch)
    finally:
        handle.remove()


def main() -> int:
    """Train them one after another; `<name>-<rank>.json` beside a run says how it ended badly."""
    recipe, folder, *names = sys.argv[1:]
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        allow_fsdp_on_cpu()
    PlannedTrainer._compute_micro_batch = _own  # type: ignore[method-assign]
    PlannedTrainer.micro_batch_loss = _with_fault  # type: ignore[method-assign]
    requests = [
        train.parse(
            [recipe, "--runs-dir", folder, "--name", name, "--set", f"training.recheck={int(name != 'off')}"]
        )
        for name in names
    ]
    index = train.prepare_first(requests[0])
    state = train.init_process_group()
    for name, options in zip(names, requests, strict=True):
        began = time.monotonic()
        try:
            train.train_once(options, index, state, os.getppid())
        except SamestepError as error:
            facts = {"words": str(error), "agreed": error.agreed, "status": error.exit_status}
            facts["seconds"] = time.monotonic() - began
            (Path(folder) / f"{name}-{state.process_index}.json").write_text(json.dumps(facts))
    destroy_process_group()
    return 0


if __name__ == "__main__":
    end_process(main())
