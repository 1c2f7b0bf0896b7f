"""Started by `accelerate launch`: `trainer.train` with data workers that live and hand nothing over from batch 3 on."""

from __future__ import annotations

import time
from typing import Any

from trainer import train, watchdog
from trainer.data.worker_transport import HandedOver
from trainer.distributed.collectives import end_process

_get = HandedOver.__getitem__


def _lose(self: HandedOver, number: int) -> Any:
    while number >= 3:
        time.sleep(60)
    return _get(self, number)


if __name__ == "__main__":
    watchdog.PATIENCE_S = 4.0
    HandedOver.__getitem__ = _lose  # type: ignore[method-assign]
    end_process(train.main())
