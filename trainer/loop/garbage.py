"""Python's cyclic garbage collector at moments of our choosing: a step never waits for it.

By itself it begins whenever enough objects were made, walks over those of torch, transformers and the model (0.1 to
0.4 s for the oldest generation), and the GPU has nothing to do meanwhile. Here what is there before the training, and
after its first step, is left out for good, and the rest is looked through once a step while the GPU still computes.
"""

from __future__ import annotations

import gc
from typing import Any


class GarbageBetweenSteps:
    """Around the training; `collect` is called once a step, when the GPU has been given all of the step's work."""

    def __init__(self) -> None:
        self._active = self._first_step_frozen = False

    def __enter__(self) -> GarbageBetweenSteps:
        gc.collect()
        gc.freeze()
        gc.disable()
        self._active, self._first_step_frozen = True, False
        return self

    def __exit__(self, *_: Any) -> None:
        self._active = False
        gc.enable()
        gc.unfreeze()

    def collect(self) -> None:
        """Look through what was made since the last call; nothing outside of the training."""
        if not self._active:
            return
        gc.collect()
        if not self._first_step_frozen:  # optimizer, wrapped model and data workers were made in between
            gc.freeze()
            self._first_step_frozen = True
