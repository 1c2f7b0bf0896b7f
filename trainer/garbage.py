"""Python's cyclic garbage collector at moments of our choosing: neither imports nor steps wait for it.

By itself it begins whenever enough objects were made. The imports of a training rank make 850,000, and nearly all stay:
it walks over them 1,500 times as their number grows, which is a fifth of the imports' processor time (1.4 of 7 s).
In training it walks over those of torch, transformers and the model (0.1 to 0.4 s for the oldest generation), and the
GPU has nothing to do meanwhile. So it waits while a program imports; what is there before the training, and after its
first step, is left out for good, and the rest is looked through once a step while the GPU still computes.

The package itself imports this module first, so it imports nothing but the standard library.
"""

from __future__ import annotations

import gc
from typing import Any

IMPORTED_OBJECTS = 1_000_000
"""So many objects more than were freed, and the collector looks at them after all, whoever imports this package."""
_OWN_THRESHOLDS = gc.get_threshold()


def pause_collection() -> None:
    """Let the collector wait for the imports: until `resume_collection`, or for `IMPORTED_OBJECTS` at a time."""
    gc.set_threshold(IMPORTED_OBJECTS, *_OWN_THRESHOLDS[1:])


def resume_collection() -> None:
    """Let the collector work as Python has it, and leave out what was imported. A second call does nothing."""
    if gc.get_threshold()[0] == IMPORTED_OBJECTS:
        gc.freeze()
        gc.set_threshold(*_OWN_THRESHOLDS)


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
