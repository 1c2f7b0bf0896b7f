"""What a run's folder says of its training: figures of every step, attempts, checkpoints, merges, sameness."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.checkpoints.adapter_file import read_digest
from launch.checkpoints.scan import Checkpoint, scan_checkpoints
from launch.errors import CheckpointError, ConfigError
from launch.monitor.status import Status, status_of
from launch.planning.plan import Plan
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.report.evaluations import EvaluationFile, read_evaluation_files
from launch.report.local_attempts import LocalAttempt, local_attempts
from launch.run.blamed import BlamedStep, read_blamed
from launch.run.directory import RunDirectory
from launch.run.figures import MOST_BYTES, number_of
from launch.run.merged_model import COMPARISON, RECORD, merge_behind
from launch.slurm.attempts import Attempt, read_ledger
from launch.untrusted_files import UNREADABLE, parse_json, read_bytes, read_mapping, read_text


@dataclass(frozen=True)
class Merge:
    """A merged model in the run's folder. `record`: merge.json; `comparison`: {} where it was not compared."""

    folder: Path
    record: dict[str, Any]
    comparison: dict[str, Any]
    behind: str | None


@dataclass(frozen=True)
class RunRecords:
    """Everything of one run that a report shows. `problems`: what could not be read, one line each."""

    run: RunDirectory
    recipe: Recipe
    recipe_text: str
    plan: Plan
    status: Status
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    losses: list[dict[str, Any]]
    attempts: tuple[Attempt, ...]
    local_attempts: list[LocalAttempt]
    checkpoints: list[Checkpoint]
    evaluations: list[EvaluationFile]
    merges: list[Merge]
    adapter_digest: str | None
    blamed: list[BlamedStep] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.run.name

    @property
    def stream_digest(self) -> str | None:
        """sha256 over the sample digests of all steps: equal for two runs that saw the same samples in the same
        steps. None where a step has no digest."""
        digests = [step.get("samples_digest") for step in self.steps]
        if not digests or not all(isinstance(digest, str) for digest in digests):
            return None
        return hashlib.sha256("".join(map(str, digests)).encode()).hexdigest()


def read_records(run: RunDirectory) -> RunRecords:
    """Read a run's folder, whatever state the run is in.

    Raises:
        ConfigError: its recipe or plan cannot be read.
    """
    problems: list[str] = []
    status = status_of(run, lambda job: None, time.time())
    evaluations, unreadable = read_evaluation_files(run)
    return RunRecords(
        run=run,
        recipe=load_recipe(run.recipe_file),
        recipe_text=read_text(run.recipe_file),
        plan=_plan_of(run),
        status=status,
        environment=_mapping(run.environment_file, problems),
        steps=_lines(run.metrics_file, problems),
        losses=_lines(run.evaluations_file, problems),
        attempts=read_ledger(run).attempts,
        local_attempts=local_attempts(run, status.state in ("running", "stalled")),
        checkpoints=_checkpoints(run, problems),
        evaluations=evaluations,
        merges=_merges(run, problems),
        adapter_digest=read_digest(run.adapter),
        blamed=read_blamed(run, problems),
        problems=[*problems, *unreadable],
    )


def _plan_of(run: RunDirectory) -> Plan:
    try:
        return Plan.read(run.plan_file)
    except OSError as error:
        raise ConfigError(f"{run.plan_file}: cannot be read ({error.strerror}); give permission") from None


def _mapping(file: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON mapping; empty where there is none, or none that can be read."""
    try:
        return read_mapping(file)
    except FileNotFoundError:
        return {}
    except UNREADABLE as error:
        problems.append(f"{file.name}: cannot be read ({error})")
        return {}


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines of a file of figures, by step; a line that is no figure is counted and left out."""
    try:
        lines = read_bytes(file, MOST_BYTES).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        problems.append(f"{file.name}: cannot be read ({error})")
        return []
    by_step: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in lines:
        try:
            values = parse_json(line)
            by_step[int(values["step"])] = values
        except (ValueError, LookupError, TypeError, OverflowError):
            damaged += 1
    if damaged:
        problems.append(f"{file.name}: {damaged} lines cannot be read and are left out")
    return [by_step[step] for step in sorted(by_step)]


def _checkpoints(run: RunDirectory, problems: list[str]) -> list[Checkpoint]:
    try:
        return [each for each in scan_checkpoints(run.path, verify=False) if each.published]
    except CheckpointError as error:
        problems.append(str(error))
        return []


def _merges(run: RunDirectory, problems: list[str]) -> list[Merge]:
    return [
        Merge(
            folder,
            _mapping(folder / RECORD, problems),
            _mapping(folder / COMPARISON, problems),
            merge_behind(run, folder),
        )
        for folder in (run.merged, run.merged_dequantized)
        if (folder / RECORD).is_file()
    ]


def number(values: dict[str, Any], key: str) -> float | None:
    """A finite figure of a line; None where there is none."""
    value = number_of(values, key)
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Sameness:
    """Two runs, step by step. `first_difference`: the first common step with other samples, None without one;
    `largest_loss_difference`: relative, over the common steps with the same samples."""

    first: str
    second: str
    common_steps: int
    same_steps: int
    first_difference: int | None
    largest_loss_difference: float | None


def sameness_of(first: RunRecords, second: RunRecords) -> Sameness:
    """Samples and losses of the steps that both runs took."""
    others = {step["step"]: step for step in second.steps}
    common = [(step, others[step["step"]]) for step in first.steps if step["step"] in others]
    same = [(a, b) for a, b in common if a.get("samples_digest") == b.get("samples_digest") is not None]
    differing = [a["step"] for a, b in common if a.get("samples_digest") != b.get("samples_digest")]
    gaps = [gap for a, b in same if (gap := _relative(number(a, "loss"), number(b, "loss"))) is not None]
    return Sameness(
        first.name, second.name, len(common), len(same), min(differing, default=None), max(gaps, default=None)
    )


def _relative(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return None
    return abs(first - second) / max(abs(first), abs(second), 1e-12)


def total_seconds(steps: Sequence[dict[str, Any]]) -> float:
    """Seconds of all steps together; evaluations and saves are not in them."""
    return sum(number(step, "seconds") or 0.0 for step in steps)
