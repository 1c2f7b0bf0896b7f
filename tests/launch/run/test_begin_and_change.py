"""Where a request goes on: with nothing, with the run of its name, or with a checkpoint of another run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launch.errors import CheckpointError, ConfigError
from launch.inputs.identity import RunIdentity
from launch.planning.plan import Plan, samples_consumed
from launch.planning.run_steps import step_plan
from launch.planning.step_plan import SampleStream, StreamOffset
from launch.recipe.fingerprint import altering_values
from launch.recipe.loading import load_recipe
from launch.run.changes import consequences
from launch.run.continuation import (
    Continuation,
    as_begun,
    continue_run,
    refuse_an_end_behind,
    refuse_another_identity,
)
from launch.run.directory import RunDirectory
from tests.helpers.attempts import BATCH, INDEX, attempt, planned, recipe_of, save_step
from tests.helpers.checkpoints import ADAPTER, change_one_bit, names


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "mine")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint of another run: step 10 of batches of 8."""
    other = RunDirectory(tmp_path / "runs" / "other")
    attempt(other, recipe_of(), save=10)
    return other.checkpoint(10)


# the run itself


def test_what_was_never_begun_begins_at_the_beginning_and_nothing_is_written(run: RunDirectory) -> None:
    assert continue_run(run, recipe_of(), ()) == Continuation()
    assert not run.path.parent.exists()


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.tuples(*[st.integers(1, 30)] * 3),
    taken=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    restarts=st.booleans(),
)
def test_two_changes_of_the_batch_size_in_a_row_skip_nothing_and_repeat_nothing(
    sizes: tuple[int, int, int], taken: tuple[int, int], restarts: bool
) -> None:
    """Through the files of a run: what each attempt's trainer sees, up to the checkpoint that it saves."""
    assume(sum(size * count for size, count in zip(sizes, taken, strict=False)) + sizes[2] <= 300)
    with tempfile.TemporaryDirectory() as folder:
        run, seen, step = RunDirectory(Path(folder) / "run"), [], 0
        for number, size in enumerate(sizes):
            recipe = recipe_of(size)
            plan = attempt(run, recipe, BATCH)
            if restarts:  # killed before it had saved: the same command, without --allow
                plan = attempt(run, recipe)
            upto = step + taken[number] if number < 2 else plan.max_steps
            steps = step_plan(recipe, INDEX, plan)
            assert step >= plan.begin.step
            for taken_now in range(step, upto):
                seen += steps.samples(taken_now).tolist()
            assert samples_consumed(plan, upto) == len(seen)
            save_step(run, recipe, plan, upto)
            step = upto
        left = plan.samples_left
    straight = SampleStream(
        n=50, global_batch_size=300, seed=recipe.training.seed, fingerprint=INDEX.fingerprint
    ).samples(0)
    assert seen == straight[: 300 - left].tolist()
    assert left < sizes[2]


def test_a_change_taken_back_before_it_was_saved_leaves_no_trace(run: RunDirectory) -> None:
    first = attempt(run, recipe_of(8), save=5)
    assert attempt(run, recipe_of(4), BATCH).begin == StreamOffset(5, 40)
    again = attempt(run, recipe_of(8), BATCH)
    assert (again.begin, again.max_steps) == (StreamOffset(), first.max_steps)


def test_what_is_allowed_once_stays_so_for_the_same_command(run: RunDirectory) -> None:
    attempt(run, recipe_of(), save=5)
    changed = recipe_of(8, "training.learning_rate=0.5")
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        continue_run(run, changed, ())
    first = continue_run(run, changed, ("training.learning_rate",))
    assert [change.key for change in first.changed] == ["training.learning_rate"]
    assert attempt(run, changed, "training.learning_rate").allowed == ["training.learning_rate"]
    assert load_recipe(run.recipe_file) == changed
    assert attempt(run, changed, "training.seed").allowed == ["training.learning_rate", "training.seed"]
    later = continue_run(run, changed, ())
    assert (later.changed, later.allowed) == ((), ("training.learning_rate", "training.seed"))
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):  # the way back is a change as well
        continue_run(run, recipe_of(), ())


def test_a_kill_between_the_two_files_of_a_request_allows_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run, recipe_of(), save=5)
    changed = recipe_of(4, "training.learning_rate=0.5")
    allow = ("training.learning_rate", BATCH)
    expected = planned(changed, continue_run(run, changed, allow))
    monkeypatch.setattr("launch.run.request_files.dump_recipe", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attempt(run, changed, *allow)
    monkeypatch.undo()
    assert Plan.from_json(run.plan_file.read_text()) == expected
    with pytest.raises(ConfigError, match=r"--allow training\.learning_rate"):
        continue_run(run, changed, ())
    assert planned(changed, continue_run(run, changed, allow)) == expected
    back = continue_run(run, recipe_of(), ())
    assert (back.begin, back.changed) == (StreamOffset(), ())


def test_a_request_is_replaced_whole_and_leaves_no_drafts(run: RunDirectory) -> None:
    attempt(run, recipe_of())
    attempt(run, recipe_of())
    assert names(run.path) == {"recipe.yaml", "plan.json"}


def test_the_plan_goes_back_when_the_checkpoint_of_the_change_is_damaged(run: RunDirectory) -> None:
    """Its own words would send the user round for ever: the change was at step 8, the run must go on at 5."""
    attempt(run, recipe_of(8), save=5)
    attempt(run, recipe_of(8), save=8)
    assert attempt(run, recipe_of(4), BATCH).begin == StreamOffset(8, 64)
    change_one_bit(run.checkpoint(8) / ADAPTER)
    assert attempt(run, recipe_of(4)).begin == StreamOffset(5, 40)
    shutil.rmtree(run.checkpoint(5))
    assert attempt(run, recipe_of(4)).begin == StreamOffset()


@pytest.mark.parametrize("plan", ["", "{", "[]", '{"begin": null, "allowed": 7}', "null"])
def test_without_a_plan_that_can_be_read_the_checkpoint_says_where_the_arithmetic_begins(
    plan: str, run: RunDirectory
) -> None:
    attempt(run, recipe_of(8), save=5)
    attempt(run, recipe_of(4), BATCH, save=9)
    run.plan_file.write_text(plan)
    assert continue_run(run, recipe_of(4), ()) == Continuation(StreamOffset(5, 40))
    assert continue_run(run, recipe_of(2), (BATCH,)).begin == StreamOffset(9, 56)
    run.plan_file.unlink()
    run.plan_file.mkdir()
    assert continue_run(run, recipe_of(4), ()).begin == StreamOffset(5, 40)


def test_an_ordinary_run_is_not_read_to_be_continued(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(run, recipe_of(), save=5)
    monkeypatch.setattr("launch.run.continuation.newest_valid", lambda _: 1 / 0)
    assert continue_run(run, recipe_of(), ()).begin == StreamOffset()


def test_a_checkpoint_that_does_not_say_where_it_stands_is_refused_only_where_that_matters(
    run: RunDirectory,
) -> None:
    plan = attempt(run, recipe_of(8))
    save_step(run, recipe_of(8), plan, 5, global_batch_size=None, begin={"step": "x"})
    assert continue_run(run, recipe_of(8), ()).begin == StreamOffset()
    with pytest.raises(CheckpointError, match=r"checkpoint-5: its manifest .* \(begin, global_batch_size\)"):
        continue_run(run, recipe_of(4), (BATCH,))


def test_a_finished_run_whose_checkpoints_were_thrown_away_keeps_its_number_of_steps(
    run: RunDirectory,
) -> None:
    attempt(run, recipe_of(8), save=5)
    plan = attempt(run, recipe_of(4), BATCH, save=9)
    run.adapter.mkdir()
    for folder in run.checkpoints():
        shutil.rmtree(folder)
    assert attempt(run, recipe_of(4)).max_steps == plan.max_steps


@pytest.mark.parametrize("text", ["", "checkpoint: {keep: 1}", "training: {of_another_version: 1}", "a: ["])
def test_a_run_whose_own_recipe_cannot_be_read_says_which_file_and_what_to_do(
    text: str, run: RunDirectory
) -> None:
    attempt(run, recipe_of(), save=5)
    run.recipe_file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        continue_run(run, recipe_of(), ())
    assert caught.value.problems[-1].startswith(
        f"{run.recipe_file}: what the run was begun with cannot be read"
    )
    assert "--fresh" in caught.value.problems[-1]


# its data and its end


def rows_of(fingerprint: str) -> RunIdentity:
    return RunIdentity({"data.train.rows": fingerprint})


def test_other_rows_behind_the_same_words_are_refused_unless_allowed(run: RunDirectory) -> None:
    old, new = rows_of(INDEX.fingerprint), rows_of("e" * 64)
    assert refuse_another_identity(run, new, ()) == []
    attempt(run, recipe_of())
    assert refuse_another_identity(run, new, ()) == []  # no step, nothing to lose
    attempt(run, recipe_of(), save=5)
    assert refuse_another_identity(run, old, ()) == []
    for useless in ([], ["data.loss"], ["training.seed"]):
        with pytest.raises(
            ConfigError, match=r"data\.train\.rows: the run has 'ffff.*--allow data\.train\.rows"
        ):
            refuse_another_identity(run, new, useless)
    for allow in (["data.content"], ["data.dataset"]):
        (change,) = refuse_another_identity(run, new, allow)
        assert (change.key, change.old, change.new) == ("data.train.rows", "f" * 64, "e" * 64)
    run.plan_file.write_text("{")  # then the checkpoint's own words decide, in the trainer
    assert refuse_another_identity(run, new, ()) == []


def test_a_source_on_other_rows_is_refused_unless_allowed(run: RunDirectory, other: Path) -> None:
    assert refuse_another_identity(run, rows_of(INDEX.fingerprint), (), other) == []
    with pytest.raises(ConfigError, match=r"checkpoint-10: was begun otherwise"):
        refuse_another_identity(run, rows_of("e" * 64), (), other)
    assert len(refuse_another_identity(run, rows_of("e" * 64), ("data.content",), other)) == 1


def test_an_end_that_lies_behind_the_run_is_refused_before_anything_is_written(
    run: RunDirectory, other: Path
) -> None:
    refuse_an_end_behind(run, 1)
    attempt(run, recipe_of(), save=5)
    attempt(run, recipe_of(), save=9)
    refuse_an_end_behind(run, 9)
    with pytest.raises(
        ConfigError, match=r"training\.max_steps: .*mine is beyond that end already \(8 < 9 steps\)"
    ):
        refuse_an_end_behind(run, 8)
    change_one_bit(run.checkpoint(9) / ADAPTER)  # it would be passed over
    refuse_an_end_behind(run, 8)
    with pytest.raises(ConfigError, match=r"\(4 < 5 steps\)"):
        refuse_an_end_behind(run, 4)
    refuse_an_end_behind(run, 10, other)
    with pytest.raises(ConfigError, match=r"checkpoint-10 is beyond that end already \(9 < 10 steps\)"):
        refuse_an_end_behind(run, 9, other)


# what an older version did not know


def older(run: RunDirectory, *, key: str = "prefix_sharing") -> None:
    """A run whose own copy of the recipe has no such key."""
    attempt(run, recipe_of())
    lines = run.recipe_file.read_text().splitlines(keepends=True)
    assert any(key in line for line in lines)
    run.recipe_file.write_text("".join(line for line in lines if key not in line))


def test_the_same_command_goes_on_with_a_run_as_the_older_version_began_it(
    run: RunDirectory, tmp_path: Path
) -> None:
    older(run)
    file = tmp_path / "recipe.yaml"
    shutil.copy(run.recipe_file, file)
    request = load_recipe(file)
    assert request.batch.prefix_sharing
    taken = as_begun(run, request)
    assert not taken.batch.prefix_sharing
    assert continue_run(run, taken, ()).changed == ()
    assert request.model_copy(update={"batch": taken.batch}) == taken
    attempt(run, taken)  # now its own copy has the key
    assert as_begun(run, request) == taken


def test_a_run_that_begins_with_an_older_ones_checkpoint_is_as_that_was_begun(
    run: RunDirectory, tmp_path: Path
) -> None:
    source = RunDirectory(tmp_path / "runs" / "older")
    begun = recipe_of(8, "batch.prefix_sharing=false")
    attempt(source, begun, save=10)
    checkpoint = source.checkpoint(10)
    assert "batch.prefix_sharing" not in altering_values(begun)
    request = load_recipe(source.recipe_file).model_copy(update={"batch": recipe_of().batch})
    assert request.batch.prefix_sharing
    taken = as_begun(run, request, checkpoint)
    assert not taken.batch.prefix_sharing
    assert continue_run(run, taken, (), checkpoint).changed == ()
    source.recipe_file.unlink()  # lost: its checkpoint says what it was begun with
    assert as_begun(source, request) == taken
    assert as_begun(run, request, tmp_path / "no such folder") == request


def test_what_the_request_says_itself_is_held_against_the_older_run(
    run: RunDirectory, tmp_path: Path
) -> None:
    older(run)
    file = tmp_path / "recipe.yaml"
    shutil.copy(run.recipe_file, file)
    request = as_begun(run, load_recipe(file, ["batch.prefix_sharing=true"]))
    assert request.batch.prefix_sharing
    with pytest.raises(ConfigError, match=r"batch\.prefix_sharing: the run has False, the recipe True"):
        continue_run(run, request, ())
    (line,) = consequences(continue_run(run, request, ["batch.prefix_sharing"]).changed)
    assert "other dropout masks" in line


def test_a_run_of_this_version_and_one_that_never_began_take_the_request_as_it_is(run: RunDirectory) -> None:
    assert as_begun(run, recipe_of()) == recipe_of()
    attempt(run, recipe_of())
    assert as_begun(run, recipe_of()).batch.prefix_sharing
    run.recipe_file.write_text("- no recipe\n")
    assert as_begun(run, recipe_of()) == recipe_of()
    run.recipe_file.write_text("a: [")
    assert as_begun(run, recipe_of()) == recipe_of()
