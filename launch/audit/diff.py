"""Two runs side by side: what they were made of, and the first step at which their figures part. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch.audit.recorded import changes_since, identity_of, read_plan
from launch.checkpoints.adapter_file import read_digest
from launch.errors import ConfigError
from launch.inputs.identity import short
from launch.planning.plan import Plan
from launch.recipe.fingerprint import LATER, altering_values
from launch.recipe.loading import load_recipe
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.figures import number_of, read_steps
from launch.untrusted_files import UNREADABLE, read_mapping

TOLERANCES = {"float32": 1e-6, "bfloat16": 2e-3, "float16": 2e-3}
"""dtype of the products -> the largest relative difference of losses that another order of summation explains.

float32: every layout, strategy and move that docs/sameness.md lists stays below it on CPUs. The 16-bit figure is that
of the GPU tests (`tests/gpu`), where kernels of other shapes sum in other orders.
"""
FLOAT32_ON_GPUS = 1e-4
"""As `TOLERANCES`, where one of the runs had GPUs: the figure of the GPU tests."""
NORM_FACTOR = 10
"""A gradient norm may differ by so many times the tolerance: it is a root of a sum over values of both signs."""

GROWTH_STEPS = 5
MOST_GROWTH = 30
"""What rounding explains grows evenly with the steps since the first one that rounded otherwise: by the tolerance in
every `GROWTH_STEPS`, to `MOST_GROWTH` times the tolerance at most.

Measured with the embedded recipe, whose learning rate (4e-3) is twenty times the usual one, float32, single against
ddp of 2: losses differ by up to 6e-7 in the first 60 steps and 7.5e-6 at step 131, norms by 1.3e-4 at step 114.
"""

Section = Literal["recipe", "data and model", "changed on the way", "plan", "versions"]
Quantity = Literal["samples", "target_tokens", "loss", "grad_norm", "learning_rate"]
_EXACT: tuple[tuple[Quantity, str], ...] = (("samples", "samples_digest"), ("target_tokens", "target_tokens"))
_COMPUTED: tuple[Quantity, ...] = ("loss", "grad_norm")
_CLOSE: tuple[Quantity, ...] = ("loss", "grad_norm", "learning_rate")
_PLAN = (
    "strategy",
    "world_size",
    "device",
    "micro_batch_tokens",
    "micro_batches",
    "compute_dtype",
    "load_in_4bit",
)


@dataclass(frozen=True)
class Difference:
    """One value that two runs have otherwise."""

    section: Section
    key: str
    left: object
    right: object


@dataclass(frozen=True)
class Parting:
    """The first step at which one quantity differs by more than `tolerance` (relative, of that step; 0: at all)."""

    quantity: Quantity
    step: int
    left: object
    right: object
    relative: float | None
    tolerance: float


@dataclass(frozen=True)
class Comparison:
    """Two runs, compared. `largest_loss_difference` is relative.

    `rounding_from`: the first step whose loss is not equal to the bit; `unequal_from`: whose loss or gradient norm is
    not. `same_adapter`: None where one of them has none; `last_steps`: the last that each has taken.
    """

    left: str
    right: str
    differences: tuple[Difference, ...]
    steps: int
    partings: tuple[Parting, ...]
    rounding_from: int | None
    unequal_from: int | None
    largest_loss_difference: float
    same_adapter: bool | None
    last_steps: tuple[int, int]

    @property
    def names(self) -> tuple[str, str]:
        """What tells the two apart in a table: their folders' names, or the whole paths where these are equal."""
        left, right = Path(self.left).name, Path(self.right).name
        return (left, right) if left != right else (self.left, self.right)

    @property
    def first(self) -> Parting | None:
        """What parts first; of one step, samples before tokens before the loss."""
        return min(self.partings, key=lambda parting: parting.step, default=None)

    def to_json(self) -> str:
        """All fields, and the verdict."""
        values = {
            **asdict(self),
            "first": asdict(self.first) if self.first else None,
            "verdict": verdict(self),
        }
        return json.dumps(values, indent=1, default=str)


def compare_runs(left: RunDirectory, right: RunDirectory) -> Comparison:
    """Compare what two folders hold. Reads no weights and loads no model.

    Raises:
        ConfigError: a run has no recipe, plan or figures that can be read, or they have no step in common.
    """
    recipes = [load_recipe(run.recipe_file) for run in (left, right)]
    plans = [read_plan(run) for run in (left, right)]
    figures = [read_steps(run.metrics_file) for run in (left, right)]
    common = sorted(figures[0].keys() & figures[1].keys())
    if not common:
        raise ConfigError(
            f"{left.path}, {right.path}: have no step in common (compare runs that have taken steps)"
        )
    pairs = [(step, figures[0][step], figures[1][step]) for step in common]
    tolerance = tolerance_of(*plans)
    adapters = [read_digest(run.adapter) for run in (left, right)]
    return Comparison(
        str(left.path),
        str(right.path),
        tuple(_differences(left, right, recipes, plans, common[0])),
        len(common),
        tuple(_partings(pairs, tolerance, comparable=plans[0].samples_digest == plans[1].samples_digest)),
        next((step for step, a, b in pairs if a.get("loss") != b.get("loss")), None),
        next((step for step, a, b in pairs if any(a.get(key) != b.get(key) for key in _COMPUTED)), None),
        max((_relative(a, b, "loss") or 0.0 for _, a, b in pairs), default=0.0),
        None if None in adapters else adapters[0] == adapters[1],
        (max(figures[0]), max(figures[1])),
    )


def tolerance_of(*plans: Plan) -> float:
    """The largest relative difference of losses that rounding explains between attempts with these plans."""
    figures = [TOLERANCES.get(plan.compute_dtype, TOLERANCES["float32"]) for plan in plans]
    return max(*figures, FLOAT32_ON_GPUS if any(plan.device == "cuda" for plan in plans) else 0.0)


def verdict(comparison: Comparison) -> str:
    """In one sentence: the same run or not, and where to look."""
    first = comparison.first
    if first is None:
        if comparison.rounding_from is None:
            return f"the same run: all figures of {comparison.steps} common steps are equal to the bit"
        return (
            f"the same run within rounding: losses differ from step {comparison.rounding_from} on, by "
            f"{comparison.largest_loss_difference:.1e} at most"
        )
    if first.quantity == "samples":
        return f"not the same run: from step {first.step} on they train on other samples"
    if first.quantity == "target_tokens":
        return f"not the same run: at step {first.step} the same samples have other target tokens (template, processor)"
    share = "" if first.relative is None else f" by {first.relative:.1e}"
    return (
        f"not the same run: the {first.quantity} of step {first.step} differs{share}, on the same samples and tokens; "
        f"rounding explains {first.tolerance:.0e}"
    )


def _differences(
    left: RunDirectory, right: RunDirectory, recipes: Sequence[Recipe], plans: Sequence[Plan], first: int
) -> Iterator[Difference]:
    """`first`: the first step that both have taken. What was allowed to change after it is known as far as checkpoints
    from before the change are left."""
    changed = [
        {change.key: ", then ".join(change.shown()) for change in changes_since(run, first)}
        for run in (left, right)
    ]
    unchanged = dict.fromkeys({**changed[0], **changed[1]}, "no change")
    values: list[tuple[Section, list[Mapping[str, Any]]]] = [
        ("recipe", [{**LATER, **altering_values(recipe)} for recipe in recipes]),
        ("data and model", [identity_of(plan).parts for plan in plans]),
        ("changed on the way", [{**unchanged, **each} for each in changed]),
        ("plan", [{key: getattr(plan, key) for key in _PLAN} for plan in plans]),
        ("versions", [_versions(run) for run in (left, right)]),
    ]
    for section, (before, after) in values:
        for key in sorted({*before, *after}):
            a, b = before.get(key), after.get(key)
            if a != b and not (
                section == "data and model" and None in (a, b)
            ):  # an older version recorded fewer
                yield Difference(
                    section,
                    key,
                    *((short(str(x)) for x in (a, b)) if section == "data and model" else (a, b)),
                )


def _versions(run: RunDirectory) -> dict[str, str]:
    try:
        return {
            str(name): str(version)
            for name, version in read_mapping(run.environment_file)["versions"].items()
        }
    except (*UNREADABLE, LookupError, AttributeError):
        return {}


def compare_steps(
    pairs: Sequence[tuple[int, dict[str, Any], dict[str, Any]]], tolerance: float, comparable: bool = True
) -> tuple[list[Parting], bool, float]:
    """(what parts, whether all figures are equal to the bit, the largest relative difference of losses).

    `pairs`: (step, figures, other figures), from the first step that the two may have taken otherwise. `comparable`:
    both name samples in the same way.
    """
    partings = list(_partings(pairs, tolerance, comparable))
    exact = [key for _, key in _EXACT if comparable or key != "samples_digest"]
    bitwise = all(a.get(key) == b.get(key) for _, a, b in pairs for key in (*exact, *_CLOSE))
    return partings, bitwise, max((_relative(a, b, "loss") or 0.0 for _, a, b in pairs), default=0.0)


def _partings(
    pairs: Sequence[tuple[int, dict[str, Any], dict[str, Any]]], tolerance: float, comparable: bool
) -> Iterator[Parting]:
    """`comparable`: both name samples in the same way; an older version named them by position."""
    for quantity, key in _EXACT:
        if quantity == "samples" and not comparable:
            continue
        for step, a, b in pairs:
            if a.get(key) != b.get(key):
                yield Parting(quantity, step, a.get(key), b.get(key), None, 0.0)
                break
    rounded = next((step for step, a, b in pairs if any(a.get(key) != b.get(key) for key in _CLOSE)), 0)
    for quantity in _CLOSE:
        for step, a, b in pairs:
            relative = _relative(a, b, quantity)
            limit = tolerance * _growth(quantity, step - rounded)
            if relative is not None and not relative <= limit:
                yield Parting(quantity, step, a.get(quantity), b.get(quantity), relative, limit)
                break


def _growth(quantity: Quantity, steps: int) -> float:
    """How many times the tolerance rounding explains, so many steps after the first that rounded otherwise."""
    if quantity == "learning_rate":
        return 1.0
    factor = NORM_FACTOR if quantity == "grad_norm" else 1
    return factor * min(1 + max(steps, 0) / GROWTH_STEPS, MOST_GROWTH)


def _relative(a: dict[str, Any], b: dict[str, Any], name: str) -> float | None:
    """|a - b| / max(|a|, |b|); infinite where one of them is no finite number."""
    x, y = number_of(a, name), number_of(b, name)
    if x is None and y is None:
        return None
    if x is None or y is None or not (math.isfinite(x) and math.isfinite(y)):
        return (
            0.0
            if x == y or (x is not None and y is not None and math.isnan(x) and math.isnan(y))
            else math.inf
        )
    return abs(x - y) / max(abs(x), abs(y), 1e-30)
