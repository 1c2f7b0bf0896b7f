"""How the trainer's commands speak: our words plainly, the libraries' only when something is the matter."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from typing import Any

import torch
import transformers

from launch.console import take_any_terminal
from launch.errors import SamestepError
from launch.invocation import as_typed
from launch.untrusted_files import printable_lines
from trainer.attempt_log import LOG, LineFilter
from trainer.garbage import resume_collection


def setup_logging() -> None:
    """Our own messages from INFO on, the libraries' from WARNING on, their deprecations among themselves never.

    Every command calls it first: it also settles what the libraries read from the environment when they wake, and
    ends the pause of the garbage collector.
    """
    resume_collection()
    take_any_terminal()
    _outlive_the_listeners()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed 0.19 else warns that it found none
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    for library in ("transformers", "datasets"):  # whose words have handlers of their own
        for handler in logging.getLogger(library).handlers:
            handler.setFormatter(_Printable())
            if isinstance(handler, logging.StreamHandler) and _is_replaced(sys.stderr):  # made before that
                handler.setStream(sys.stderr)
    logging.getLogger("transformers.trainer_utils").addFilter(_is_no_matter_of_cadence)
    logging.getLogger("trainer").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):  # half a second with pandas: who reads no rows does without
        datasets.disable_progress_bars()


def _is_no_matter_of_cadence(record: logging.LogRecord) -> bool:
    """Drop transformers' warning (5.23, `compare_trainer_and_checkpoint_args`) that the checkpoint was written with
    another cadence of saves or evaluations: the recipe's holds (`StepEnd.on_train_begin`), and may be changed."""
    return "do not match the ones in the `trainer_state.json`" not in record.getMessage()


class _Printable(logging.Formatter):
    """A message may quote what others wrote: no terminal obeys it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class HangupSafeStream(io.FileIO):
    """A terminal or a pipe that may end while the run goes on: what is written to it then is lost, and nothing else.

    What is written is copied to the log of the attempt.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lines = LineFilter(LOG)

    def write(self, data: Any) -> int:
        """As `FileIO.write`; after a terminal hung up (EIO) or a reader went (EPIPE) all is taken for written."""
        try:
            written = super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            written = memoryview(data).nbytes
        self._lines.feed(bytes(data)[:written])  # the rest of a short write comes again
        return written


def _outlive_the_listeners() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # a program that caught our words (pytest)
            continue
        # Only the process's own: a program that catches its words (pytest) has put a file of its own there.
        if isinstance(stream, io.TextIOWrapper) and descriptor in (1, 2) and not _is_replaced(stream):
            raw = HangupSafeStream(descriptor)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True
            )
            setattr(sys, name, text)


def _is_replaced(stream: Any) -> bool:
    return isinstance(getattr(getattr(stream, "buffer", None), "raw", None), HangupSafeStream)


def print_error(error: SamestepError) -> int:
    """Say what went wrong on stderr, without a traceback; returns the exit status."""
    print(f"error: {printable_lines(as_typed(str(error)))}", file=sys.stderr, flush=True)
    return error.exit_status
