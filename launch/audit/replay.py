"""Steps of a run, taken again from the checkpoint before them, and compared with the figures that the run wrote.

The step plan makes every step a function of the run's folder: any machine that has the data and the base can take it
again, with another strategy and another number of processes.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.audit.diff import TOLERANCES, Parting, compare_steps, read_plan
from launch.audit.figures import read_steps
from launch.checkpoints.scan import Checkpoint, scan_checkpoints
from launch.errors import ConfigError, RunError
from launch.inputs.identity import TRAIN_ROWS, RunIdentity
from launch.local.execute import execute_with_oom_retry
from launch.local.planned_run import RunRequest, plan_run
from launch.planning.plan import Plan
from launch.run.changes import content_changes, refuse_changes
from launch.run.directory import RunDirectory, request_stop

LOOK_EVERY_S = 0.2
_QUIET = (
    "checkpoint.every_steps=1000000000",
    "checkpoint.first_step=false",
    "evaluation.every_steps=1000000000",
    "tracking.report_to=none",
    "hub.push=false",
)
"""What alters no number of a step, and costs time, or would show others the copy as if it were the run."""


@dataclass(frozen=True)
class Replay:
    """Steps `first` to `last`, taken again. `checkpoint`: where they began; None: at step 0.

    `parting`: the first figure that differs beyond `tolerance`; None: none does. `bitwise`: no figure differs at all.
    """

    first: int
    last: int
    checkpoint: str | None
    strategy: str
    world_size: int
    tolerance: float
    parting: Parting | None
    bitwise: bool
    largest_loss_difference: float

    def __str__(self) -> str:
        steps = f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"
        how = f"{steps}, from {self.checkpoint or 'step 0'} by {self.strategy} x {self.world_size}"
        if self.parting:
            first = self.parting
            return (
                f"{how}: DIFFERENT from step {first.step} on, {first.quantity} was {first.left}, is {first.right} "
                f"(tolerance {first.tolerance:.0e})"
            )
        if self.bitwise:
            return f"{how}: equal to the bit"
        largest = f"{self.largest_loss_difference:.1e} (at most {self.tolerance:.0e})"
        return f"{how}: equal within rounding, losses within {largest}"

    def to_json(self) -> str:
        """All fields."""
        return json.dumps(asdict(self), indent=1, default=str)


def refuse_steps_not_taken(steps: tuple[int, int], last: int) -> None:
    """ConfigError unless a run of `last` steps has taken these."""
    if steps[1] > last:
        raise ConfigError(
            f"--steps: {steps[0]}:{steps[1]} is not among the steps 1 to {last} that the run has taken"
        )


def random_steps(count: int, seed: int, last: int) -> list[int]:
    """`count` different steps of 1 to `last`, in order, by a seed."""
    return sorted(random.Random(seed).sample(range(1, last + 1), min(count, last)))


def replay(run: RunDirectory, first: int, last: int, request: RunRequest) -> Replay:
    """Take the steps again in a folder of their own, which goes when this ends. The run itself is only read.

    `request`: with which strategy and processes, and what may differ (`--allow`); the rest of it is filled in here.

    Raises:
        ConfigError: the data or the base is another one (the part is named), or the request breaks a rule.
        RunError: the training failed.
    """
    plan, recorded = read_plan(run), read_steps(run.metrics_file)
    begin = _checkpoint_before(run, first)
    with tempfile.TemporaryDirectory(prefix=f".replay-{run.name}-", dir=run.path.parent) as folder:
        copy = RunDirectory(Path(folder) / run.name)
        _copy_until(run, copy, begin)
        asked = replace(
            request, recipe=str(copy.recipe_file), overrides=_QUIET, name=run.name, runs_dir=Path(folder)
        )
        planned = plan_run(asked)
        _refuse_another_identity(run, plan, planned.plan, request.allow)
        with _stopped_after(copy, last):
            execute_with_oom_retry(planned, asked)
        again = read_steps(copy.metrics_file)
    pairs = [
        (step, recorded[step], again[step])
        for step in range(first, last + 1)
        if step in recorded and step in again
    ]
    if len(pairs) != last - first + 1:
        raise RunError(f"{run.path}: steps {first} to {last} were not all taken again; see the words above")
    tolerance = TOLERANCES.get(plan.compute_dtype, TOLERANCES["float32"])
    partings, bitwise, largest = compare_steps(
        pairs, tolerance, plan.samples_digest == planned.plan.samples_digest
    )
    return Replay(
        first,
        last,
        begin.folder.name if begin else None,
        planned.plan.strategy,
        planned.plan.world_size,
        tolerance,
        min(partings, key=lambda parting: parting.step, default=None),
        bitwise,
        largest,
    )


def _refuse_another_identity(run: RunDirectory, plan: Plan, now: Plan, allow: Sequence[str]) -> None:
    """ConfigError that names each part of data and base which is another one than the run was made of."""
    before, after = (
        RunIdentity({**each.identity, TRAIN_ROWS: each.dataset_fingerprint}) for each in (plan, now)
    )
    refuse_changes(content_changes(before, after), allow, str(run.path), "bring back what it was made of")


def _checkpoint_before(run: RunDirectory, step: int) -> Checkpoint | None:
    """The newest valid checkpoint of an earlier step. ConfigError where a run of another's checkpoint has none."""
    earlier = [each for each in scan_checkpoints(run.path) if each.valid and each.step < step]
    if earlier:
        return max(earlier, key=lambda each: each.step)
    if read_plan(run).started_from:
        raise ConfigError(
            f"{run.path}: began with another run's checkpoint, and none before step {step} is left"
        )
    return None


def _copy_until(run: RunDirectory, copy: RunDirectory, begin: Checkpoint | None) -> None:
    """What a resume of the copy reads: recipe, plan, figures until the checkpoint, the checkpoint."""
    copy.path.mkdir()
    shutil.copyfile(run.recipe_file, copy.recipe_file)
    if begin is None:
        return
    shutil.copyfile(run.plan_file, copy.plan_file)
    steps = read_steps(run.metrics_file)
    kept = (json.dumps(steps[step]) + "\n" for step in sorted(steps) if step <= begin.step)
    atomic_write(copy.metrics_file, "".join(kept))
    shutil.copytree(begin.folder, copy.path / begin.folder.name)


@contextlib.contextmanager
def _stopped_after(run: RunDirectory, step: int) -> Iterator[None]:
    """While the block trains, ask for a stop as soon as the figures of `step` are there."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            with contextlib.suppress(ConfigError):
                if step in read_steps(run.metrics_file):
                    request_stop(run, "user")
                    return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def replays(run: RunDirectory, ranges: Sequence[tuple[int, int]], request: RunRequest) -> Iterator[Replay]:
    """One after another."""
    for first, last in ranges:
        yield replay(run, first, last, request)
