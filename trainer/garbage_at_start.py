"""Python's cyclic garbage collector while a program imports what it needs: it waits.

The imports of a training rank make 850,000 objects, and nearly all stay. The collector walks over them 1,500 times as
their number grows, which is a fifth of the imports' processor time (1.4 of 7 s).
"""

from __future__ import annotations

import gc

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
