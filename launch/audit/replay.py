"""Steps of a run, taken again from the checkpoint before them, and compared with the figures that the run wrote.

The step plan makes every step a function of the run's folder: any machine that has the data and the base can take it
again, with another strategy and another number of processes.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from launch.audit.diff import Parting, compare_steps, tolerance_of
from launch.audit.environment import Change, altered_libraries, environment_changes
from launch.audit.recorded import changed_since, read_plan
from launch.audit.restored import restored
from launch.console import log_stderr
from launch.errors import ConfigError, RunError
from launch.local.execute import execute_with_oom_retry
from launch.local.planned_run import RunRequest
from launch.run.directory import RunDirectory, request_stop
from launch.run.figures import read_steps

LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class Replay:
    """Steps `first` to `last`, taken again. `checkpoint`: where they began; None: at step 0.

    `parting`: the first figure that differs beyond `tolerance`; None: none does. `bitwise`: no figure differs at all.
    `environment`: what is otherwise here than where the run's newest attempt was. `altered_libraries`: code files that
    are not as their packages brought them, looked for where a figure differs. `changed`: what the run was allowed to
    change after it took the steps, each in words.
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
    environment: tuple[Change, ...]
    altered_libraries: tuple[str, ...]
    changed: tuple[str, ...] = ()

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

    def notes(self, allowed: Sequence[str] = ()) -> Iterator[str]:
        """Say what differs here, a line for each kind. `allowed`: the parts of data and base that may (`--allow`)."""
        if allowed:
            yield f"allowed to be other data or another base: {', '.join(allowed)}"
        if self.environment:
            yield f"environment, of the run's newest attempt -> here: {', '.join(map(str, self.environment))}"
        for file in self.altered_libraries:
            yield f"library not as it was installed: {file}"
        if self.parting and self.changed:
            yield (
                "the steps were taken before a change of the run that was allowed, so they cannot come out as they "
                f"were: {'; '.join(self.changed)}"
            )
        elif self.parting and not (allowed or self.environment or self.altered_libraries):
            yield (
                "environment: the recorded versions and hardware are these here, and no library file was changed; look "
                "at the machines with `samestep doctor`, and for the module with `samestep diff --deep`"
            )

    def to_json(self) -> str:
        """All fields."""
        return json.dumps(asdict(self), indent=1, default=str)


def refuse_steps_not_taken(steps: tuple[int, int], last: int) -> None:
    """ConfigError unless a run of `last` steps has taken these."""
    if not last:
        raise ConfigError("--steps: metrics.jsonl of the run has no step; nothing can be taken again")
    if steps[1] > last:
        named = ":".join(map(str, dict.fromkeys(steps)))
        raise ConfigError(f"--steps: {named} is not among the steps 1 to {last} that the run has taken")


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
    if lost := next((step for step in range(first, last + 1) if step not in recorded), None):
        raise ConfigError(f"--steps: {run.metrics_file} has no figures of step {lost}; name other steps")
    with restored(run, first, request) as again:
        with _stopped_after(again.run, last):
            marker = execute_with_oom_retry(again.planned, again.request)
        figures = again.run.metrics_file
        taken = read_steps(figures) if figures.exists() else {}
        now, begin = again.planned.plan, again.begin
        changes = environment_changes(run, again.run)
    if not set(range(first, last + 1)) <= taken.keys():
        if marker.kind == "STOPPED":  # by a Ctrl-C: our own request comes when the steps are taken
            log_stderr("interrupted; give the same command again")
            raise KeyboardInterrupt
        raise RunError(f"{run.path}: steps {first} to {last} were not all taken again; see the words above")
    # The steps from the checkpoint to the first one asked for too: they tell how long rounding has grown.
    pairs = [
        (step, recorded[step], taken[step])
        for step in sorted(recorded.keys() & taken.keys())
        if (begin.step if begin else 0) < step <= last
    ]
    tolerance = tolerance_of(plan, now)
    partings, bitwise, largest = compare_steps(pairs, tolerance, plan.samples_digest == now.samples_digest)
    parting = min(partings, key=lambda parting: parting.step, default=None)
    changed = changed_since(run, first)
    if parting and not changed:
        log_stderr("comparing the libraries' files with what their packages brought")
    return Replay(
        first,
        last,
        begin.folder.name if begin else None,
        now.strategy,
        now.world_size,
        tolerance,
        parting,
        bitwise,
        largest,
        changes,
        altered_libraries() if parting and not changed else (),
        changed,
    )


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
