"""Which samples made the loss of a step, and what the run would have been without some of them.

Both are computed again, in a copy of the run, from the newest checkpoint before the step. The result is kept in the
run's folder, `blame/step-<step>.json`, where the report finds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write
from launch.audit.diff import tolerance_of
from launch.audit.recorded import changed_since, read_plan, refuse_steps_of_another_plan
from launch.audit.restored import QUIET, UNEVALUATED, call_here, restored
from launch.errors import ConfigError
from launch.inputs.dataset_index import read_index
from launch.local.planned_run import PlannedRun, RunRequest
from launch.planning.run_steps import stream_of
from launch.recipe.loading import load_recipe
from launch.run.blamed import BlamedSample, blame_file
from launch.run.directory import RunDirectory
from launch.run.figures import number_of, read_steps
from launch.untrusted_files import UNREADABLE, parse_json, read_text

MODULE = "trainer.audit.blame"


@dataclass(frozen=True)
class StepWithout:
    """One figure of a step, as the run recorded it and without the rows. `name`: loss, grad_norm or eval_loss."""

    step: int
    name: str
    recorded: float
    without: float


@dataclass(frozen=True)
class Blame:
    """The samples of a step, the one with the largest share of its loss first.

    `loss`: of the step, as the shares add up; `recorded_loss`: as the run wrote it; they agree within `tolerance`
    (relative) where the run's step can be recomputed here. `without`: rows that were left out from this step on;
    `steps`: what that changed. `changed`: what the run was allowed to change after it took `step`, each in words: the
    new value holds in all that was computed here.
    """

    step: int
    checkpoint: str
    loss: float
    recorded_loss: float | None
    tolerance: float
    samples: tuple[BlamedSample, ...]
    without: tuple[int, ...] = ()
    steps: tuple[StepWithout, ...] = field(default=())
    changed: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """The losses computed here are those of the run."""
        if self.recorded_loss is None:
            return False
        return abs(self.loss - self.recorded_loss) <= self.tolerance * max(self.loss, self.recorded_loss)

    def to_json(self) -> str:
        """All fields."""
        return json.dumps({**asdict(self), "agrees": self.agrees}, indent=1)


def blame(
    run: RunDirectory, step: int, without: Sequence[int], until: int | None, request: RunRequest
) -> Blame:
    """Compute the losses of a step's samples; with `without` also the steps to `until` without these rows.

    The plan stays: every step has the same samples, dropout masks, learning rate and divisor of its loss, so the other
    rows keep their weight, and a step's gradient lacks the part of the rows that are left out and nothing else.
    `until`: by default the last step that the run has recorded. Keeps the result in the run's folder.

    Raises:
        ConfigError: the run did not take these steps, a row is not among the step's samples, or as `restored`.
        ChildError: the training failed.
    """
    recorded = read_steps(run.metrics_file)
    last = _last_step(step, without, until, recorded)
    refuse_steps_of_another_plan(run, step, "--step")
    refuse_rows_of_other_steps(run, step, without)
    with restored(run, step, request, (*QUIET, *(() if without else UNEVALUATED))) as copy:
        # Again: the data may have been prepared only now, and `--allow` lets it be another one.
        refuse_rows_of_other_steps(run, step, without, copy.planned)
        output = copy.run.path / "losses.json"
        rows = ["--without", ",".join(map(str, without))] if without else []
        call_here(
            copy,
            f"blame {run.name}",
            MODULE,
            ["--step", str(step), "--last", str(last), "--output", str(output), *rows],
        )
        samples = [BlamedSample(**each) for each in parse_json(read_text(output))]
        steps = _steps_without(run, copy.run, step, recorded) if without else ()
        result = Blame(
            step,
            copy.begins_at,
            sum(each.share for each in samples),
            number_of(recorded[step], "loss"),
            tolerance_of(read_plan(run), copy.planned.plan),
            tuple(sorted(samples, key=lambda each: -each.share)),
            tuple(without),
            steps,
            changed_since(run, step),
        )
    _keep(run, result)
    return result


def _keep(run: RunDirectory, result: Blame) -> None:
    file = blame_file(run, result.step)
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, result.to_json() + "\n")


def _last_step(
    step: int, without: Sequence[int], until: int | None, recorded: dict[int, dict[str, Any]]
) -> int:
    reached = max(recorded, default=0)
    if step not in recorded:
        raise ConfigError(f"--step: {step} is not among the steps 1 to {reached} that the run has taken")
    if until is not None and not without:
        raise ConfigError("--until: belongs to --without; name a row to leave out, or leave --until out")
    if until is not None and not step <= until <= reached:
        raise ConfigError(f"--until: {until} is not among the steps {step} to {reached} that follow")
    if not without:
        return step
    return reached if until is None else until


def refuse_rows_of_other_steps(
    run: RunDirectory, step: int, rows: Sequence[int], planned: PlannedRun | None = None
) -> None:
    """ConfigError unless the rows are of the step's samples.

    `planned`: the run as it was planned here, perhaps of other data (`--allow`). Without it the run's own plan counts,
    and nothing is said where its data is not prepared yet.
    """
    if not rows:
        return
    if planned is None:
        recipe, plan = load_recipe(run.recipe_file), read_plan(run)
    else:
        recipe, plan = planned.recipe, planned.plan
    index = read_index(recipe)
    if index is None or index.fingerprint != plan.dataset_fingerprint:
        if planned is None:
            return
        raise ConfigError(
            f"{run.path}: its prepared data was changed meanwhile; run `samestep prepare {run.recipe_file}`"
        )
    known = [int(row) for row in index.splits["train"].rows[stream_of(recipe, plan).samples(step - 1)]]
    if foreign := sorted({*rows} - {*known}):
        raise ConfigError(
            f"--without: row {foreign[0]} is not among the samples of step {step} (rows "
            f"{', '.join(map(str, sorted(known)))}); `samestep blame {run.name} --step {step}` ranks them"
        )


def _steps_without(
    run: RunDirectory, copy: RunDirectory, step: int, recorded: dict[int, dict[str, Any]]
) -> tuple[StepWithout, ...]:
    taken = read_steps(copy.metrics_file)
    evaluated = [_evaluations(each.evaluations_file) for each in (run, copy)]
    pairs = [
        (number, name, number_of(recorded.get(number, {}), name), number_of(taken[number], name))
        for number in sorted(taken)
        if number >= step
        for name in ("loss", "grad_norm")
    ]
    pairs += [
        (number, "eval_loss", evaluated[0][number], evaluated[1][number])
        for number in sorted(evaluated[0].keys() & evaluated[1].keys())
        if number >= step
    ]
    return tuple(
        StepWithout(number, name, before, after)
        for number, name, before, after in pairs
        if before is not None and after is not None
    )


def _evaluations(file: Path) -> dict[int, float]:
    """Step -> validation loss, as far as the file can be read."""
    losses = {}
    try:
        for line in read_text(file).splitlines():
            values = parse_json(line)
            if (loss := number_of(values, "loss")) is not None and isinstance(values.get("step"), int):
                losses[values["step"]] = loss
    except (*UNREADABLE, AttributeError):
        pass
    return losses
