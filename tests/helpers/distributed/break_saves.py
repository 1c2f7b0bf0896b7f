"""Started by `accelerate launch` on two processes: one sharded run after another, whose save at step 4 goes wrong.

`straight` ends; `full` finds no room on rank 1, then goes on and ends; in `killed` rank 1 is killed once its part lies
on the disk, and this launch with it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.errors import SamestepError
from trainer import train
from trainer.distributed.collectives import end_process
from trainer.formats.sharded import ZeroRankState
from trainer.logging_setup import setup_logging

_write = ZeroRankState.write


def _only_at_step_4(go_wrong: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def write(part: ZeroRankState, folder: Path, group: Any) -> list[str]:
        chosen = os.environ["RANK"] == "1" and folder.parent.name == "checkpoint-4.partial"
        return (go_wrong if chosen else _write)(part, folder, group)

    return write


def _find_no_room(part: ZeroRankState, folder: Path, group: Any) -> list[str]:
    """Really refused by the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        return _write(part, folder, group)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _die(part: ZeroRankState, folder: Path, group: Any) -> list[str]:
    _write(part, folder, group)
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def main() -> None:
    """Arguments: those of `trainer.train` but `--name`."""
    setup_logging()
    options = {name: train.parse([*sys.argv[1:], "--name", name]) for name in ("straight", "full", "killed")}
    index, state = train.prepare_first(options["full"]), train.init_process_group()
    train.train_once(options["straight"], index, state, os.getppid())
    ZeroRankState.write = _only_at_step_4(_find_no_room)  # type: ignore[method-assign]
    try:
        train.train_once(options["full"], index, state, os.getppid())
    except SamestepError as error:
        sys.stdout.write(f"rank {state.process_index} ended with: {error}\n")
        sys.stdout.flush()
    ZeroRankState.write = _write  # type: ignore[method-assign]
    train.train_once(options["full"], index, state, os.getppid())
    ZeroRankState.write = _only_at_step_4(_die)  # type: ignore[method-assign]
    train.train_once(options["killed"], index, state, os.getppid())
    end_process(0)


if __name__ == "__main__":
    main()
