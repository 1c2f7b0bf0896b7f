"""Where in the model two runs part: their first differing step computed again in both, module by module."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launch.audit.diff import Comparison, tolerance_of
from launch.audit.recorded import read_plan, refuse_steps_of_another_plan
from launch.audit.restored import call_here, restored
from launch.errors import ConfigError
from launch.inputs.dataset_index import read_index
from launch.local.planned_run import RunRequest
from launch.planning.run_steps import step_plan
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory
from launch.run.figures import number_of, read_steps
from launch.untrusted_files import TABLE, read_mapping

MODULE = "trainer.audit.fingerprint"
OUTPUT_TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""dtype of the products -> the largest relative difference of a module's output that rounding explains.

float32 has 24 bits: one rounding is 6e-8, and a sum over a few thousand products in another order, layer after layer,
stays below a hundred of them. 16-bit products round by 4e-3 (bfloat16) each; `trainer.checks.training.output_tolerance`
allows a wrapped model 1e-2 of its largest output, and two runs may each be off by that.
"""
GRADIENT_FACTOR = 10
"""Gradients may differ by so many times as much, as `launch.audit.diff.NORM_FACTOR` has it for their norm."""

Pass = Literal["weights", "forward", "backward"]


@dataclass(frozen=True)
class ModuleDifference:
    """The first module in order of computation whose fingerprints differ beyond `tolerance` (relative)."""

    module: str
    during: Pass
    relative: float
    tolerance: float


@dataclass(frozen=True)
class DeepComparison:
    """One step of two runs, computed again here from what their folders hold.

    `weights`: the largest relative difference of an adapter's weights before the step. `first`: None: no module
    differs beyond rounding. `unequal`: the first module whose output is not equal to the bit; None: all are.
    `identical`: no fingerprint differs at all. `reproduced`: whether the loss that each run recorded for the step came
    out here again. `modules`: how many were compared.
    """

    step: int
    samples: int
    modules: int
    weights: float
    first: ModuleDifference | None
    unequal: ModuleDifference | None
    identical: bool
    reproduced: tuple[bool, bool]
    recorded: tuple[float | None, float | None]
    computed: tuple[float | None, float | None]

    def to_json(self) -> str:
        """All fields."""
        return json.dumps(asdict(self), indent=1)


def repeats_to_the_bit(comparison: Comparison, left: RunDirectory, right: RunDirectory) -> bool:
    """Whether two runs would be equal to the bit but for what differs: one layout, one set of versions, exact kernels.

    Exact are CPUs, float32, and `training.deterministic`.
    """
    if any(difference.section in ("plan", "versions") for difference in comparison.differences):
        return False
    plans = [read_plan(run) for run in (left, right)]
    return all(
        plan.device == "cpu"
        or plan.compute_dtype == "float32"
        or load_recipe(run.recipe_file).training.deterministic
        for run, plan in zip((left, right), plans, strict=True)
    )


def parting_step(comparison: Comparison, exact: bool = False) -> int | None:
    """The first step whose loss or gradient norm parts; None: all are equal to the bit.

    Where none parts beyond rounding, or `exact` (`repeats_to_the_bit`), it is the first that is not equal to the bit:
    from there on weights differ, and the step that parts beyond rounding says less.

    Raises:
        ConfigError: the samples or their tokens part before.
    """
    steps = {parting.quantity: parting.step for parting in comparison.partings}
    step = min((steps[name] for name in ("loss", "grad_norm") if name in steps), default=None)
    if step is None or (exact and comparison.unequal_from is not None):
        step = comparison.unequal_from
    if step is None:
        return None
    for name in ("samples", "target_tokens"):
        if steps.get(name, step + 1) <= step:
            raise ConfigError(
                f"--deep: the {name.replace('_', ' ')} part at step {steps[name]}, so no module is to blame; compare "
                "what the runs were made of, above"
            )
    return step


def compare_deeply(left: RunDirectory, right: RunDirectory, step: int, request: RunRequest) -> DeepComparison:
    """Compute the first micro-batch that `step` has in the left run in both of them, in one process here.

    Raises:
        ConfigError: data or base of one are others here, the micro-batch's rows are not in both, or one run alone
            shares the prefix of its samples.
        ChildError: a computation failed; it has said why.
    """
    if len({load_recipe(run.recipe_file).batch.prefix_sharing for run in (left, right)}) > 1:
        raise ConfigError(
            "--deep: one of the runs shares the prefix of its samples, the other computes it in each "
            "(batch.prefix_sharing), so their modules see rows of other lengths; compare their losses alone"
        )
    rows = _first_micro_batch(left, step)
    seen = [_fingerprints(run, step, rows, request) for run in (left, right)]
    recorded = tuple(number_of(read_steps(run.metrics_file).get(step, {}), "loss") for run in (left, right))
    tolerances = [tolerance_of(read_plan(run)) for run in (left, right)]
    dtype = max((read_plan(run).compute_dtype for run in (left, right)), key=_tolerance)
    computed = tuple(each["step_loss"] for each in seen)
    weights = _differences(seen[0]["weights"], seen[1]["weights"])
    outputs = _differences(seen[0]["outputs"], seen[1]["outputs"])
    gradients = _differences(seen[0]["gradients"], seen[1]["gradients"])
    limit = _tolerance(dtype)
    return DeepComparison(
        step,
        len(rows),
        len(seen[0]["outputs"]),
        max(weights.values(), default=0.0),
        _first_beyond(outputs, limit, "forward", limit)
        or _first_beyond(gradients, limit * GRADIENT_FACTOR, "backward", limit * GRADIENT_FACTOR),
        _first_beyond(outputs, 0.0, "forward", limit),
        not any((*weights.values(), *outputs.values(), *gradients.values())),
        tuple(_same(*pair) for pair in zip(recorded, computed, tolerances, strict=True)),  # type: ignore[arg-type]
        recorded,  # type: ignore[arg-type]
        computed,
    )


def _first_beyond(
    differences: Mapping[str, float], least: float, during: Pass, tolerance: float
) -> ModuleDifference | None:
    """The first module in order that differs by more than `least`."""
    beyond = ((name, relative) for name, relative in differences.items() if not relative <= least)
    return next((ModuleDifference(short_name(name), during, each, tolerance) for name, each in beyond), None)


def deep_verdict(deep: DeepComparison, names: tuple[str, str]) -> str:
    """In words: the module, or where else to look."""
    how = f"step {deep.step} computed again in both ({deep.samples} samples, {deep.modules} modules)"
    if deep.first:
        what = "gradient" if deep.first.during == "backward" else "output"
        return (
            f"{how}: {deep.first.module} is the first module whose {what} differs, by {deep.first.relative:.1e}; "
            f"rounding explains {deep.first.tolerance:.0e}, so this is another setting or a fault"
        )
    same = "is equal to the bit" if deep.identical else "agrees within rounding"
    words = f"{how}: every module {same}"
    lost = [
        f"the loss that {name} recorded ({before:.6g}) does not come out here ({now:.6g})"
        for name, held, before, now in zip(names, deep.reproduced, deep.recorded, deep.computed, strict=True)
        if not held and before is not None and now is not None
    ]
    if lost:
        return f"{words}; {' and '.join(lost)}: it came from the machine or the libraries there, not from its folder"
    if deep.unequal and deep.weights == 0:
        return (
            f"{words}; from equal weights, {deep.unequal.module} is the first module whose output is not equal to the "
            f"bit ({deep.unequal.relative:.1e}): look there first"
        )
    if deep.weights > 0:
        return f"{words}; the weights before the step differ by {deep.weights:.1e}: the runs parted little by little"
    return f"{words}; what parted them lies in later micro-batches of the step"


def short_name(module: str) -> str:
    """Without what PEFT puts before every name."""
    return module.removeprefix("base_model.model.")


def relative_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Of two fingerprints, [norm, sums]: about the norm of the tensors' difference, as a share of the larger norm."""
    if not all(map(math.isfinite, (*left, *right))):
        return 0.0 if [*map(str, left)] == [*map(str, right)] else math.inf
    scale = max(left[0], right[0])
    squares = [(a - b) ** 2 for a, b in zip(left[1:], right[1:], strict=True)]
    apart = max(math.sqrt(sum(squares) / len(squares)), abs(left[0] - right[0]))
    return apart / scale if scale else 0.0


def _differences(
    left: Mapping[str, Sequence[float]], right: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """By module, in the order of the left run; a module that one of them has not differs wholly."""
    names = [*left, *(name for name in right if name not in left)]
    return {
        name: relative_difference(left[name], right[name]) if name in left and name in right else 1.0
        for name in names
    }


def _fingerprints(run: RunDirectory, step: int, rows: Sequence[str], request: RunRequest) -> dict[str, Any]:
    with restored(run, step, request) as copy:
        output = copy.run.path / "fingerprints.json"
        call_here(
            copy,
            "diff --deep",
            MODULE,
            ["--step", str(step), "--rows", ",".join(rows), "--output", str(output)],
        )
        seen = read_mapping(output, TABLE)
        seen["step_loss"] = number_of(read_steps(copy.run.metrics_file).get(step, {}), "loss")
    return seen


def _first_micro_batch(run: RunDirectory, step: int) -> list[str]:
    """Digests of the rows that rank 0 computes first in a step (counted from 1)."""
    refuse_steps_of_another_plan(run, step, "--deep")
    recipe, plan = load_recipe(run.recipe_file), read_plan(run)
    index = read_index(recipe)
    if index is None or index.fingerprint != plan.dataset_fingerprint:
        raise ConfigError(
            f"{run.path}: its data is not prepared on this machine; run `samestep prepare {run.recipe_file}`"
        )
    batch = step_plan(recipe, index, plan).micro_batches_of(step - 1, 0)[0]
    return [index.splits["train"].digests[sample].hex() for sample in batch.samples]


def _tolerance(dtype: str) -> float:
    return OUTPUT_TOLERANCES.get(dtype, OUTPUT_TOLERANCES["float32"])


def _same(recorded: float | None, computed: float | None, tolerance: float) -> bool:
    if recorded is None or computed is None:
        return False
    return abs(recorded - computed) <= tolerance * max(abs(recorded), abs(computed))
