"""What a comparison of modules says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.audit import deep
from launch.audit.deep import (
    DeepComparison,
    ModuleDifference,
    deep_verdict,
    parting_step,
    relative_difference,
)
from launch.audit.diff import Comparison, Difference, Parting, Quantity, Section
from launch.errors import ConfigError
from launch.local.planned_run import RunRequest
from launch.run.directory import RunDirectory
from tests.helpers.attempts import attempt, recipe_of

SAME = DeepComparison(6, 4, 90, 0.0, None, None, True, (True, True), (2.0, 2.0), (2.0, 2.0))


def comparison(*partings: tuple[Quantity, int]) -> Comparison:
    found = tuple(Parting(quantity, step, 1, 2, 0.5, 1e-6) for quantity, step in partings)
    return Comparison("a", "b", (), 8, found, None, None, 0.5, None, (8, 8))


def test_the_step_is_the_first_whose_loss_or_norm_parts() -> None:
    assert parting_step(comparison(("loss", 6), ("grad_norm", 5))) == 5
    assert parting_step(comparison(("loss", 6), ("samples", 7))) == 6
    assert parting_step(comparison()) is None
    assert parting_step(replace(comparison(), unequal_from=3)) == 3
    beyond = replace(comparison(("grad_norm", 5)), unequal_from=3)
    assert (parting_step(beyond), parting_step(beyond, exact=True)) == (5, 3)
    assert parting_step(comparison(("learning_rate", 3))) is None


@pytest.mark.parametrize(
    ("dtype", "deterministic", "section", "exact"),
    [
        ("bfloat16", True, "recipe", True),
        ("bfloat16", False, "recipe", False),
        ("float32", False, "recipe", True),
        ("float32", False, "plan", False),
        ("float32", False, "versions", False),
    ],
)
def test_runs_of_one_layout_with_exact_kernels_are_looked_into_where_they_are_not_equal_to_the_bit(
    dtype: str, deterministic: bool, section: Section, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimpleNamespace(recipe_file=None)
    plan, training = (
        SimpleNamespace(device="cuda", compute_dtype=dtype),
        SimpleNamespace(deterministic=deterministic),
    )
    monkeypatch.setattr(deep, "read_plan", lambda _: plan)
    monkeypatch.setattr(deep, "load_recipe", lambda _: SimpleNamespace(training=training))
    differs = replace(comparison(), differences=(Difference(section, "key", 1, 2),))
    assert deep.repeats_to_the_bit(differs, run, run) is exact  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("partings", "words"),
    [
        ((("samples", 4), ("loss", 4)), "the samples part at step 4"),
        ((("target_tokens", 2), ("loss", 3)), "the target tokens part at step 2"),
    ],
)
def test_where_no_module_is_to_blame_it_is_refused(
    partings: tuple[tuple[Quantity, int], ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        parting_step(comparison(*partings))


def test_the_verdict_tells_a_module_from_a_machine_and_from_rounding() -> None:
    found = replace(SAME, first=ModuleDifference("layers.0.mlp", "forward", 0.3, 1e-5), identical=False)
    assert "layers.0.mlp is the first module whose output differs, by 3.0e-01" in deep_verdict(
        found, ("a", "b")
    )
    machine = replace(SAME, reproduced=(True, False), recorded=(2.0, 3.0))
    assert "the loss that b recorded (3) does not come out here (2)" in deep_verdict(machine, ("a", "b"))
    unequal = ModuleDifference("layers.0.self_attn.k_proj", "forward", 3e-4, 2e-2)
    within = replace(SAME, identical=False, unequal=unequal)
    words = "layers.0.self_attn.k_proj is the first module whose output is not equal to the bit (3.0e-04)"
    assert words in deep_verdict(within, ("a", "b"))
    drifted = replace(within, weights=1e-7)
    assert "parted little by little" in deep_verdict(drifted, ("a", "b"))


def test_numbers_that_are_none_differ_from_all_others() -> None:
    assert relative_difference([math.nan, 1.0], [1.0, 1.0]) == math.inf
    assert relative_difference([math.nan, 1.0], [math.nan, 1.0]) == 0.0
    assert relative_difference([0.0, 0.0], [0.0, 0.0]) == 0.0


def test_runs_of_which_one_alone_shares_its_prefix_are_not_looked_into(tmp_path: Path) -> None:
    """Their modules see rows of other lengths."""
    runs = [RunDirectory(tmp_path / name) for name in ("shared", "whole")]
    for run, value in zip(runs, ("true", "false"), strict=True):
        attempt(run, recipe_of(8, f"batch.prefix_sharing={value}"))
    with pytest.raises(ConfigError, match="--deep: one of the runs shares the prefix of its samples"):
        deep.compare_deeply(runs[0], runs[1], 1, RunRequest(recipe="", runs_dir=tmp_path))
