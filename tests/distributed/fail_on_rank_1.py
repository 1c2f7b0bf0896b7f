"""Started by `accelerate launch`: a training whose loss becomes NaN on rank 1 alone, in step 2."""

from __future__ import annotations

import os
import sys
from typing import Any

from trainer import train
from trainer.sft import PlannedTrainer

_compute_loss = PlannedTrainer.compute_loss


def _poisoned(self: PlannedTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    loss = _compute_loss(self, model, inputs, *args, **kwargs)
    return loss * float("nan") if os.environ["RANK"] == "1" and inputs["step"] == 1 else loss


PlannedTrainer.compute_loss = _poisoned  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(train.main())
