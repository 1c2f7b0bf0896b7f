"""`samestep run` again: with something changed, further than before, from another run, and how an attempt is ended."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.console import echo
from launch.planning.plan import Plan
from launch.planning.step_plan import StreamOffset
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory, read_marker, request_stop, requested_stop, write_marker
from launch.subprocesses import processes_with
from tests.helpers.checkpoints import ADAPTER, change_one_bit, names
from tests.helpers.indexes import make_index
from tests.helpers.launcher import EMBEDDED, Launcher, flag, samestep, stand_in

RATE = ["--set", "training.learning_rate=0.5"]
ALLOW_RATE = ["--allow", "training.learning_rate"]
MINE = RunDirectory(Path("runs/embedded"))
FROM = ["--name", "second", "--from", "runs/embedded/checkpoint-3"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    """A machine of two CPU processes with prepared data; the working folder is empty."""
    monkeypatch.setenv("COLUMNS", "200")
    return stand_in(monkeypatch, tmp_path)


@pytest.fixture
def stopped(launcher: Launcher) -> Launcher:
    """A run `embedded` of 6 steps that was stopped at step 3."""
    launcher.marker, launcher.text, launcher.saves = "STOPPED", "user: at step 3 of 6", [3]
    assert samestep("run", *EMBEDDED) == 0
    launcher.marker, launcher.text, launcher.saves = "DONE", "", [6]
    return launcher


def plan_of(name: str = "embedded") -> Plan:
    return Plan.from_json(Path("runs", name, "plan.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# with something changed


def test_a_change_is_refused_with_both_values_and_the_key_to_allow(
    stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(Path("runs"))
    rate = load_recipe(MINE.recipe_file).training.learning_rate
    for useless in ([], ["--allow", "training.seed"], ["--allow", "training.weight_decay", "--dry-run"]):
        capsys.readouterr()
        assert samestep("run", *EMBEDDED, *RATE, *useless) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"training.learning_rate: the run has {rate}, the recipe 0.5; "
            "give the run's value, or --allow training.learning_rate",
            f"{MINE.path.absolute()}: was begun otherwise (values that differ: 1); choose another --name, "
            "or --fresh to move the old run aside",
        ]
    assert contents(Path("runs")) == before
    assert len(stopped.commands) == 1


def test_an_allowed_change_says_what_it_does_before_anything_starts_and_then_stays_allowed(
    stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    stopped.meanwhile = lambda run, ask: said.append(capsys.readouterr().out)
    stopped.marker, stopped.saves = None, []  # killed before it has saved
    capsys.readouterr()
    assert samestep("run", *EMBEDDED, *RATE, *ALLOW_RATE) == 1
    assert "allowed: training.learning_rate: " in said[0]
    assert "-> 0.5; the rest of the run uses the new value" in said[0]
    assert load_recipe(MINE.recipe_file).training.learning_rate == 0.5
    stopped.marker, stopped.saves = "DONE", [6]
    assert samestep("run", *EMBEDDED, *RATE) == 0
    assert plan_of().allowed == ["training.learning_rate"]
    assert "allowed to differ" in said[1]
    assert "allowed:" not in said[1]


def test_a_value_that_goes_back_to_what_older_versions_did_can_be_allowed(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.marker, launcher.text, launcher.saves = "STOPPED", "asked to", [3]
    assert samestep("run", *EMBEDDED, "--set", "lora.use_rslora=true") == 0
    launcher.marker, launcher.text, launcher.saves = "DONE", "", [6]
    assert samestep("run", *EMBEDDED) == 2
    assert "lora.use_rslora: the run has True, the recipe False" in capsys.readouterr().err
    assert samestep("run", *EMBEDDED, "--allow", "lora.use_rslora") == 0
    assert "allowed: lora.use_rslora: " in capsys.readouterr().out


@pytest.mark.parametrize("key", ["lora.r=4", "lora.target_modules=[q_proj]"])
def test_what_the_adapter_is_made_of_is_refused_with_and_without_allow(
    key: str, stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("run", *EMBEDDED, "--set", key, "--allow", key.partition("=")[0]) == 2
    assert "which no --allow changes" in capsys.readouterr().err
    assert len(stopped.commands) == 1


def test_an_allowance_of_nothing_is_refused_with_the_nearest_key(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("run", *EMBEDDED, "--allow", "training.lerning_rate") == 2
    assert "did you mean training.learning_rate?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_rows_are_allowed_by_name_and_then_stay_the_runs_own(
    stopped: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_index(200)
    monkeypatch.setattr(
        "launch.local.planned_run.read_index", lambda _: type(other)(other.path, "e" * 64, other.splits)
    )
    assert samestep("run", *EMBEDDED, "--allow", "data.loss") == 2
    assert "--allow data.train.rows" in capsys.readouterr().err
    stopped.marker, stopped.saves = None, []
    assert samestep("run", *EMBEDDED, "--allow", "data.content") == 1
    assert "allowed: data.train.rows: 'ffffffffffff' -> 'eeeeeeeeeeee'; " in capsys.readouterr().out
    assert samestep("run", *EMBEDDED) == 1
    assert plan_of().allowed == ["data.content"]
    assert plan_of().dataset_fingerprint == "e" * 64


def test_another_batch_size_goes_on_from_the_samples_that_were_seen(stopped: Launcher) -> None:
    smaller = ["embedded", "--set", "batch.global_batch_size=8", "--set", "training.max_steps=-1"]
    allow = ["--allow", "batch.global_batch_size", "--allow", "training.max_steps"]
    assert samestep("run", *smaller, *allow) == 0
    plan = plan_of()
    assert plan.begin == StreamOffset(3, 96)
    assert plan.max_steps == 3 + (3 * 330 - 96) // 8
    stopped.marker = "STOPPED"
    assert samestep("run", *smaller) == 0
    assert plan_of() == plan


# further than before


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["--set", "training.max_steps=9", "--allow", "training.max_steps"], 9),
        (["--set", "training.max_steps=-1", "--allow", "training.max_steps"], 30),
    ],
)
def test_a_finished_run_is_extended_by_name_and_the_repeat_starts_nothing(
    more: list[str], steps: int, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.saves = [6]
    assert samestep("run", *EMBEDDED) == 0
    assert samestep("run", *EMBEDDED, *more[:2]) == 2
    capsys.readouterr()
    launcher.saves = [steps]
    assert samestep("run", *EMBEDDED, *more) == 0
    assert "the learning-rate schedule is computed for the new number of steps" in capsys.readouterr().out
    assert plan_of().max_steps == steps
    assert len(launcher.commands) == 2
    for again in (more, more[:2]):
        assert samestep("run", *EMBEDDED, *again) == 0
        assert "done already" in capsys.readouterr().out
    assert len(launcher.commands) == 2


def test_more_epochs_extend_a_finished_run(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = ["embedded", "--set", "batch.global_batch_size=32", "--set", "training.max_steps=-1", "--set"]
    launcher.saves = [10]
    assert samestep("run", *epochs, "training.num_train_epochs=1") == 0
    launcher.saves = [20]
    more = [*epochs, "training.num_train_epochs=2"]
    assert samestep("run", *more, "--allow", "training.num_train_epochs") == 0
    assert samestep("run", *more) == 0
    assert [plan_of().max_steps, len(launcher.commands)] == [20, 2]


def test_an_end_behind_the_run_is_refused_and_the_run_stays_done(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.saves = [6]
    assert samestep("run", *EMBEDDED) == 0
    before = contents(Path("runs"))
    shorter = ["--set", "training.max_steps=4", "--allow", "training.max_steps"]
    assert samestep("run", *EMBEDDED, *shorter) == 2
    assert "is beyond that end already (4 < 6 steps)" in capsys.readouterr().err
    assert contents(Path("runs")) == before
    assert samestep("run", *EMBEDDED) == 0
    assert len(launcher.commands) == 1


# from another run


def test_a_run_begins_with_another_runs_checkpoint_and_repeats_go_on(
    stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    source = contents(Path("runs/embedded"))
    present: list[set[str]] = []
    stopped.meanwhile = lambda run, ask: present.append(names(run.path))
    stopped.marker, stopped.saves = "STOPPED", []
    assert samestep("run", *EMBEDDED, *FROM, *RATE, *ALLOW_RATE) == 0
    assert "allowed: training.learning_rate" in capsys.readouterr().out
    assert "checkpoint-3" in present[0]
    assert plan_of("second").started_from == str(Path("runs/embedded/checkpoint-3").absolute())
    shutil.rmtree("runs/embedded")
    assert samestep("run", *EMBEDDED, *FROM, *RATE) == 0
    stopped.marker, stopped.saves = "DONE", [6]
    assert samestep("run", *EMBEDDED, "--name", "second", *RATE) == 0
    assert "done already" not in capsys.readouterr().out
    assert samestep("run", *EMBEDDED, *FROM, *RATE) == 0
    assert "done already" in capsys.readouterr().out
    assert len(source) > 4


@pytest.mark.parametrize(
    ("spoil", "more", "words"),
    [
        (lambda folder: None, RATE, "--allow training.learning_rate"),
        (lambda folder: None, ["--set", "lora.r=4", "--allow", "lora.r"], "which no --allow changes"),
        (lambda folder: None, ["--set", "training.max_steps=2", "--allow", "training.max_steps"], "(2 < 3 steps)"),
        (lambda folder: change_one_bit(folder / ADAPTER), [], "has another content"),
        (shutil.rmtree, [], "--from: no such folder"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), [], "is no manifest"),
    ],
    ids=["changed", "other rank", "beyond the end", "damaged", "missing", "foreign"],
)  # fmt: skip
def test_a_source_that_cannot_be_gone_on_with_is_refused_and_nothing_is_written(
    spoil: Callable[[Path], object],
    more: list[str],
    words: str,
    stopped: Launcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(Path("runs/embedded/checkpoint-3"))
    assert samestep("run", *EMBEDDED, *FROM, *more) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert "Traceback" not in printed
    assert not Path("runs/second").exists()
    assert len(stopped.commands) == 1


def test_a_source_on_other_rows_is_refused_and_nothing_is_written(
    stopped: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_index(200)
    monkeypatch.setattr(
        "launch.local.planned_run.read_index", lambda _: type(other)(other.path, "e" * 64, other.splits)
    )
    assert samestep("run", *EMBEDDED, *FROM) == 2
    assert "--allow data.train.rows" in capsys.readouterr().err
    assert not Path("runs/second").exists()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as before_the_copy:
        before_the_copy.setattr("launch.local.execute.copy_checkpoint", killed)
        assert samestep("run", *EMBEDDED, *FROM, "--allow", "data.content") == 130
    assert samestep("run", *EMBEDDED, *FROM) == 0


def test_a_dry_run_from_another_run_writes_nothing(
    stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(Path("runs"))
    assert samestep("run", *EMBEDDED, *FROM, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "starts from" in shown
    assert contents(Path("runs")) == before
    assert not Path("runs/second").exists()


def test_a_run_that_began_otherwise_takes_no_other_source(
    stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped.saves = [5]
    stopped.marker = "STOPPED"
    assert samestep("run", *EMBEDDED) == 0
    assert samestep("run", *EMBEDDED, *FROM) == 0
    capsys.readouterr()
    assert samestep("run", *EMBEDDED, "--name", "second", "--from", "runs/embedded/checkpoint-5") == 2
    assert "checkpoint-3, not with " in capsys.readouterr().err
    assert samestep("run", *EMBEDDED, "--from", "runs/embedded/checkpoint-3") == 2
    assert "began with nothing" in capsys.readouterr().err


@pytest.mark.parametrize("linked", [False, True])
def test_fresh_does_not_move_away_what_it_begins_with(
    linked: bool, stopped: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    if linked:
        Path("runs").rename("elsewhere")
        Path("runs").symlink_to("elsewhere")
    before = contents(Path("runs/embedded"))
    assert samestep("run", *EMBEDDED, "--fresh", "--from", "runs/embedded/checkpoint-3") == 2
    assert "lies in the run that --fresh moves aside" in capsys.readouterr().err
    assert contents(Path("runs/embedded")) == before
    assert [name for name in names(Path("runs")) if name.startswith("embedded.")] == []


def test_fresh_begins_anew_from_another_runs_checkpoint(stopped: Launcher) -> None:
    stopped.marker, stopped.saves = "STOPPED", [5]
    assert samestep("run", *EMBEDDED, "--name", "second") == 0
    stopped.saves = []
    assert samestep("run", *EMBEDDED, *FROM, "--fresh") == 0
    assert [folder.name for folder in RunDirectory(Path("runs/second")).checkpoints()] == ["checkpoint-3"]


# how an attempt is ended


def test_a_stop_is_a_success_that_says_what_it_was(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.marker, launcher.text = "STOPPED", "preempted: at step 3 of 6"
    assert samestep("run", *EMBEDDED) == 0
    printed = capsys.readouterr().out
    assert f"stopped (preempted: at step 3 of 6): {MINE.path.absolute()}; the same command goes on" in printed
    assert "done" not in printed


def test_what_earlier_attempts_left_is_gone_before_the_trainer_starts(stopped: Launcher) -> None:
    def look(run: RunDirectory, _: Callable[[int], None]) -> None:
        assert read_marker(run) is None
        assert requested_stop(run) is None
        assert not run.save_file.exists()

    request_stop(MINE, "time")
    MINE.save_file.touch()
    stopped.meanwhile = look
    assert samestep("run", *EMBEDDED) == 0
    assert len(stopped.commands) == 2


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGINT, "user"), (signal.SIGHUP, "user"), (signal.SIGTERM, "terminated")],
)
def test_a_signal_becomes_a_stop_file_and_words(
    number: signal.Signals,
    reason: str,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    asked: list[str | None] = []

    def stop(run: RunDirectory, ask: Callable[[int], None]) -> None:
        ask(number)
        asked.append(requested_stop(run))

    launcher.meanwhile = stop
    assert samestep("run", *EMBEDDED) == 0
    assert asked == [reason]
    assert "stopping at the next step boundary; Ctrl-C again ends at once" in capsys.readouterr().err


@pytest.mark.parametrize(("killed", "status"), [(True, 130), (False, 1)])
def test_an_attempt_that_did_not_answer_leaves_no_request_behind(
    killed: bool, status: int, launcher: Launcher
) -> None:
    """Else a plain `accelerate launch` would stop at once."""
    launcher.marker, launcher.killed, launcher.meanwhile = None, killed, lambda run, ask: ask(signal.SIGINT)
    assert samestep("run", *EMBEDDED) == status
    assert not MINE.stop_file.exists()
    assert read_marker(MINE) is None


@pytest.mark.parametrize("marker", ["DONE", "STOPPED"])
def test_a_ctrl_c_that_comes_too_late_to_kill_does_not_hide_how_the_run_ended(
    marker: str, launcher: Launcher
) -> None:
    launcher.marker, launcher.killed = marker, True  # type: ignore[assignment]
    assert samestep("run", *EMBEDDED) == 0


def test_a_folder_called_stop_stops_nothing(launcher: Launcher) -> None:
    MINE.stop_file.mkdir(parents=True)
    MINE.save_file.mkdir()
    asked: list[object] = []
    launcher.meanwhile = lambda run, ask: asked.append(requested_stop(run))
    assert samestep("run", *EMBEDDED) == 0
    assert asked == [None]


def test_a_run_that_went_on_while_another_command_was_planned_is_not_overrun(
    stopped: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two commands at once, one waiting for its data: its plan would begin where the other one has been already."""
    prepared = make_index()

    def while_the_other_runs(_: object) -> object:
        monkeypatch.setattr("launch.local.planned_run.read_index", lambda _: prepared)
        stopped.saves, stopped.marker = [5], "STOPPED"
        assert samestep("run", *EMBEDDED) == 0
        return prepared

    monkeypatch.setattr("launch.local.planned_run.read_index", while_the_other_runs)
    smaller = ["--set", "batch.global_batch_size=8", "--allow", "batch.global_batch_size"]
    assert samestep("run", *EMBEDDED, *smaller) == 2
    assert "went on while this was planned" in capsys.readouterr().err
    assert plan_of().global_batch_size == 32
    assert len(stopped.commands) == 2


ORPHAN = """
import os, signal, sys, time
from contextlib import ExitStack
from pathlib import Path
from launch.run.directory import RunDirectory, clear_requests, requested_stop, write_marker
from launch.run.lock import hold_lock
run, how = RunDirectory(Path(sys.argv[sys.argv.index("--run-dir") + 1])), sys.argv[1]
with ExitStack() as held:
    if how != "importing": held.enter_context(hold_lock(run.path))
    print("up", flush=True)
    while not (reason := requested_stop(run)): time.sleep(0.02)
    if how == "hanging":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(120)
    time.sleep(0.5)
    write_marker(run, "STOPPED", f"{reason}: at step 3 of 6")
    clear_requests(run)
"""


def _orphan(how: str, launcher: Launcher) -> list[subprocess.Popen[bytes]]:
    """The launcher dies of a kill -9, and this trainer outlives it."""
    left: list[subprocess.Popen[bytes]] = []

    def outlive(run: RunDirectory, _: Callable[[int], None]) -> None:
        command = launcher.commands[-1]
        arguments = command[command.index("trainer.train") + 1 :]
        left.append(subprocess.Popen([sys.executable, "-c", ORPHAN, how, *arguments], stdout=subprocess.PIPE))
        assert left[0].stdout is not None
        left[0].stdout.readline()

    launcher.marker, launcher.status, launcher.meanwhile = None, -signal.SIGKILL, outlive
    return left


@pytest.mark.parametrize("how", ["training", "importing"])
def test_a_trainer_that_outlives_its_launcher_is_stopped_and_waited_for(
    how: str,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("launch.local.launcher.LINGERING_S", 0.3)
    left = _orphan(how, launcher)
    assert samestep("run", *EMBEDDED) == 0
    printed = capsys.readouterr()
    assert printed.err.count("the launcher has ended, waiting for its processes") == 1
    assert "stopped (orphaned: at step 3 of 6)" in printed.out
    assert left[0].wait(timeout=0.01) == 0
    assert not MINE.stop_file.exists()


def test_ctrl_c_ends_a_trainer_that_outlived_its_launcher(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.launcher.LINGERING_S", 0.3)
    left = _orphan("hanging", launcher)
    assert samestep("run", *EMBEDDED) == 130
    assert left[0].wait(timeout=20) == -signal.SIGKILL
    assert processes_with(["--run-dir", str(MINE.path.absolute())]) == []


def test_what_nobody_reads_any_more_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`samestep run | tee log`: tee dies of the Ctrl-C that the run takes for a request."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        echo("stopped")
        echo("and more")
        monkeypatch.undo()


def test_a_stale_marker_of_another_number_of_steps_does_not_count_as_done(launcher: Launcher) -> None:
    launcher.saves = [6]
    assert samestep("run", *EMBEDDED) == 0
    write_marker(MINE, "DONE", "step 5")
    launcher.saves = []
    assert samestep("run", *EMBEDDED) == 0
    assert len(launcher.commands) == 2
    assert flag(launcher.commands[1], "--run-dir") == str(MINE.path.absolute())
