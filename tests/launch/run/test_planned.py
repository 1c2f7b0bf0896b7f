"""The plan of the next attempt, as `samestep run` and a plain launch derive it."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.inputs.identity import RunIdentity
from launch.planning.plan import Plan
from launch.planning.topology import Topology
from launch.run.continuation import continue_run
from launch.run.directory import RunDirectory
from launch.run.planned import plan_attempt
from launch.run.request_files import keep_plan
from tests.helpers.attempts import INDEX, attempt, recipe_of

ONE, TWO = Topology("single", 1, 1, "cpu"), Topology("ddp", 1, 2, "cpu")
OVERRIDES = ("batch.micro_batch_tokens=auto",)


def next_plan(run: RunDirectory, topology: Topology, *overrides: str) -> Plan:
    recipe = recipe_of(8, *OVERRIDES, *overrides)
    continuation = continue_run(run, recipe, ["training.num_train_epochs"])
    allow = continuation.allowed
    plan, _ = plan_attempt(
        run, recipe, INDEX, RunIdentity({}), topology, continuation, allow=allow, name=run.name
    )
    return plan


def test_an_attempt_keeps_the_settings_of_the_last_on_the_same_hardware_and_no_other(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    plan = attempt(run, recipe_of(8, *OVERRIDES), save=3).with_settings(
        reason="came down", tried=True, out_of_memory=1
    )
    keep_plan(run, plan)
    assert next_plan(run, ONE).settings == plan.settings
    assert next_plan(run, TWO).settings.reason != "came down"


def test_a_resume_with_another_number_of_processes_may_change_the_strategy_and_says_so(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    attempt(run, recipe_of(8, *OVERRIDES), save=3)
    two = next_plan(run, replace(TWO, strategy="auto"))
    assert two.strategy == "ddp"
    assert two.strategy_reason.endswith("; the run had single on 1 process")
    keep_plan(run, two)
    assert "the run had" not in next_plan(run, replace(TWO, strategy="auto")).strategy_reason
    assert next_plan(run, TWO).strategy_reason == ""


def test_an_end_behind_the_run_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    attempt(run, recipe_of(8, *OVERRIDES), save=12)
    with pytest.raises(ConfigError, match="is beyond that end already"):
        next_plan(run, ONE, "training.num_train_epochs=1")
