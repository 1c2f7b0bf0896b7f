"""Ctrl-C ends a command without a traceback: it is an answer, not an error, and nobody needs to see where it came."""

from __future__ import annotations

import sys
from types import TracebackType


def hide_interrupts() -> None:
    """From here on, imports included. Whoever started the command says that it was interrupted."""
    hook = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            hook(kind, error, traceback)

    sys.excepthook = show
