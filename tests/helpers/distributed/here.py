"""What `tests.helpers.distributed.drive` does under `single`, without a launch: in the tests' own process."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

from tests.helpers.distributed import drive
from trainer import train
from trainer.loop.trainer import PlannedTrainer


def drive_here(requests: Sequence[tuple[Sequence[str], int | None]]) -> None:
    """Several runs of `trainer.train`, each with the step to stop at or None."""
    for arguments, stop in requests:
        run = arguments[arguments.index("--name") + 1]
        with (
            mock.patch.dict(drive.STOP_AT, {run: stop} if stop else {}),
            mock.patch.object(PlannedTrainer, "training_step", drive.ask_to_stop_in_time),
        ):
            assert train.main(arguments) == 0
