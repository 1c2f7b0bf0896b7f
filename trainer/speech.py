"""How the trainer's commands speak: our words plainly, the libraries' only when something is the matter."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import datasets
import torch
import transformers

from launch.errors import SamestepError


def speak_plainly() -> None:
    """Our own messages from INFO on, the libraries' from WARNING on, their deprecations among themselves never.

    Every command calls it first: it also settles what the libraries read from the environment when they wake.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed 0.19 else warns that it found none
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("trainer").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def complain(error: SamestepError) -> int:
    """Say what went wrong on stderr, without a traceback; returns the exit status."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_status
