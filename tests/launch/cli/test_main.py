"""The samestep command: what it refuses, what it writes, what it starts, what it returns."""

import errno
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.cli import main
from launch.inputs.dataset_index import Index
from launch.local import multi_machine
from launch.local.launcher import trainer_command
from launch.planning.plan import Plan
from launch.recipe.loading import load_recipe
from launch.run.directory import MarkerKind, RunDirectory
from launch.run.lock import hold_lock
from launch.versions import version_line
from tests.helpers.indexes import SHAPE, make_index
from tests.helpers.launcher import EMBEDDED, Launcher, flag, samestep, set_gpus, stand_in, write_adapter


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    """A machine of two CPU processes with prepared data; the working folder is empty."""
    return stand_in(monkeypatch, tmp_path)


def test_run_writes_recipe_and_plan_and_starts_the_trainer_with_them(
    launcher: Launcher, tmp_path: Path
) -> None:
    assert samestep("run", *EMBEDDED, "--name", "mine", "--set", "training.learning_rate=1e-4") == 0
    run = RunDirectory(tmp_path / "runs" / "mine")
    assert load_recipe(run.recipe_file).training.learning_rate == 1e-4
    plan = Plan.from_json(run.plan_file.read_text())
    assert (plan.name, plan.strategy, plan.world_size, plan.max_steps) == ("mine", "ddp", 2, 6)
    (command,) = launcher.commands
    assert flag(command, "--num_processes") == "2"
    assert Path(flag(command, "--config_file")).name == "ddp.yaml"
    assert command[-4:] == ["trainer.train", "--run-dir", str(run.path), "--marker-decides"]
    assert int(flag(command, "--main_process_port")) > 0


def test_prepare_fills_the_vision_cache_when_it_is_asked_to(launcher: Launcher) -> None:
    assert samestep("prepare", "embedded") == 0
    assert samestep("prepare", "embedded", "--vision", "--set", "data.vision_cache=disk") == 0
    plain, vision = launcher.commands
    assert "--vision" not in plain
    assert vision[-3:] == ["--set", "data.vision_cache=disk", "--vision"]


@pytest.mark.parametrize(
    ("gpus", "asked", "strategy", "processes"),
    [
        (0, [], "ddp", 2),
        (0, ["--gpus-per-node", "1"], "single", 1),
        (0, ["--strategy", "single"], "single", 1),
        (1, [], "single", 1),
        (4, [], "ddp", 4),
        (4, ["--gpus-per-node", "2"], "ddp", 2),
        (4, ["--strategy", "single"], "single", 1),
        (1, ["--strategy", "ddp"], "ddp", 1),
    ],
)
def test_what_is_not_said_follows_from_the_machine(
    gpus: int,
    asked: list[str],
    strategy: str,
    processes: int,
    launcher: Launcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gpus(monkeypatch, gpus)
    assert samestep("run", *EMBEDDED, *asked) == 0
    (command,) = launcher.commands
    assert Path(flag(command, "--config_file")).stem == strategy
    assert flag(command, "--num_processes") == str(processes)


def test_gpus_are_counted_as_cuda_would_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.cuda import _device_count_nvml  # type: ignore[attr-defined]

    from launch.hardware import first_visible_gpu, gpus_present

    set_gpus(monkeypatch, 8)
    monkeypatch.setattr("torch.cuda._raw_device_count_nvml", lambda: 8)
    monkeypatch.setattr(
        "torch.cuda._raw_device_uuid_nvml", lambda: [f"GPU-{number:08x}" for number in range(8)]
    )
    assert gpus_present() == 8
    visible = [
        "",
        "3",
        "0,1",
        " 0 , 1 ",
        "0,-1,1",
        "-1",
        "0,8",
        "8,0",
        "0,99999999999",
        "0,0",
        "0,1,0",
        "0,,1",
        "x",
        "0,x,1",
    ]
    visible += [
        "GPU-00000001,GPU-00000002",
        "GPU-00000001,GPU-1",
        "GPU-0",
        "GPU-00000001,GPU-00000001",
        "GPU-00000001,1",
    ]
    visible += ["0,GPU-00000001", "NoDevFiles", "1gpu2,2ampere", "+1,2", ","]
    for value in visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert gpus_present() == _device_count_nvml(), value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert (gpus_present(), first_visible_gpu()) == (2, "MIG-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000005,GPU-00000002")
    assert (gpus_present(), first_visible_gpu()) == (2, "GPU-00000005")
    set_gpus(monkeypatch, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpus_present() == 0


def test_a_single_process_sees_one_gpu(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert samestep("run", *EMBEDDED, "--strategy", "single") == 0
    (environment,) = launcher.environments
    assert environment is not None
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("marker", "status", "returned"),
    [
        ("DONE", 0, 0),
        ("DONE", 1, 0),  # accelerate returns 1 after workers that all ended well
        ("STOPPED", 1, 0),
        ("DONE", -9, 0),  # somebody killed a launcher whose workers had ended
        ("REFUSED", 1, 2),
        ("REFUSED", 0, 2),
        (None, 1, 1),
        (None, 0, 1),
    ],
)
def test_the_marker_decides_and_not_the_launcher(
    marker: MarkerKind | None,
    status: int,
    returned: int,
    launcher: Launcher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launcher.marker, launcher.status, launcher.text = marker, status, "data.x: bad (1); mend it"
    assert samestep("run", *EMBEDDED) == returned
    errors = capsys.readouterr().err
    assert ("data.x: bad (1); mend it" in errors) == (returned == 2)
    assert "Traceback" not in errors


def test_the_marker_of_an_earlier_attempt_is_not_believed(launcher: Launcher) -> None:
    assert samestep("run", *EMBEDDED) == 0
    (Path("runs/embedded/adapter/adapter_config.json")).unlink()
    launcher.marker = None
    assert samestep("run", *EMBEDDED) == 1


def test_a_refused_extension_leaves_a_finished_run_as_it_was(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.saves = (3, 6)
    assert samestep("run", *EMBEDDED) == 0
    run = RunDirectory(tmp_path / "runs" / "embedded")
    for checkpoint in run.checkpoints():
        (checkpoint / "manifest.json").write_text("{")
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    more = ["--set", "training.max_steps=16", "--allow", "training.max_steps"]
    assert samestep("run", *EMBEDDED, *more) == 2
    assert "every published checkpoint is damaged" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def test_a_run_whose_adapter_is_cut_short_is_not_done(launcher: Launcher) -> None:
    launcher.saves = (6,)
    assert samestep("run", *EMBEDDED) == 0
    weights = Path("runs/embedded/adapter/adapter_model.safetensors")
    whole = weights.read_bytes()
    for damage in (whole[:-1], whole[:20], b""):
        weights.write_bytes(damage)
        launcher.commands.clear()
        launcher.saves = ()
        assert samestep("run", *EMBEDDED) == 0
        assert any("trainer.train" in command for command in launcher.commands)
        assert weights.read_bytes() == whole


def test_a_run_that_is_done_is_not_started_again(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("run", *EMBEDDED) == 0
    assert samestep("run", *EMBEDDED) == 0
    assert len(launcher.commands) == 1
    assert "done already" in capsys.readouterr().out


def test_recipe_and_plan_of_a_run_that_is_done_are_written_anew_where_its_last_checkpoint_agrees(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.saves = (6,)
    assert samestep("run", *EMBEDDED) == 0
    run = RunDirectory(Path("runs/embedded").absolute())
    written = [file.read_text() for file in (run.recipe_file, run.plan_file)]
    run.recipe_file.unlink()
    run.plan_file.write_text('{"strategy":')
    run.metrics_file.write_text("")
    for command in ("verify", "evaluate"):
        assert samestep(command, "embedded") == 2
        assert f"{run.path}: has no recipe.yaml, without which" in capsys.readouterr().err
    assert samestep("run", *EMBEDDED, "--set", "lora.lora_alpha=99") == 0
    assert "checkpoint-6 was trained with another lora.lora_alpha; give the recipe" in capsys.readouterr().out
    assert not run.recipe_file.exists()
    assert samestep("run", *EMBEDDED) == 0
    assert "recipe.yaml and plan.json could not be read, and are written anew" in capsys.readouterr().out
    assert [file.read_text() for file in (run.recipe_file, run.plan_file)] == written
    run.plan_file.unlink()
    (run.checkpoint(6) / "manifest.json").unlink()
    assert samestep("run", *EMBEDDED) == 0
    assert "plan.json cannot be read, and checkpoint-6, which says" in capsys.readouterr().out
    assert len(launcher.commands) == 1


def test_a_run_that_stopped_goes_on_also_on_other_hardware(launcher: Launcher) -> None:
    launcher.marker = "STOPPED"
    assert samestep("run", *EMBEDDED) == 0
    assert samestep("run", *EMBEDDED, "--gpus-per-node", "3", "--set", "training.logging_steps=1") == 0
    assert [flag(command, "--num_processes") for command in launcher.commands] == ["2", "3"]


def test_a_recipe_that_alters_the_run_is_refused_with_the_values(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.marker = None
    samestep("run", *EMBEDDED, "--set", "lora.r=8")
    written = Path("runs/embedded/recipe.yaml").read_text()
    capsys.readouterr()
    assert samestep("run", *EMBEDDED, "--set", "lora.r=4", "--set", "training.seed=5") == 2
    errors = capsys.readouterr().err
    assert "lora.r: " in errors
    assert "training.seed: " in errors
    assert Path("runs/embedded/recipe.yaml").read_text() == written
    assert len(launcher.commands) == 1


def test_fresh_moves_the_older_run_aside(launcher: Launcher) -> None:
    samestep("run", *EMBEDDED, "--set", "lora.r=8")
    assert samestep("run", *EMBEDDED, "--set", "lora.r=4", "--fresh") == 0
    assert load_recipe("runs/embedded/recipe.yaml").lora.r == 4
    (old,) = Path("runs").glob("embedded.*")
    assert load_recipe(old / "recipe.yaml").lora.r == 8


def test_dry_run_shows_plan_and_command_and_writes_nothing(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("run", *EMBEDDED, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "micro-batches" in shown
    assert "--module trainer.train" in shown
    assert list(tmp_path.iterdir()) == []
    assert launcher.commands == []


def test_what_a_run_was_begun_with_and_the_request_leaves_open_is_kept_and_said(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.saves = (3, 6)
    assert samestep("run", *EMBEDDED, "--set", "batch.prefix_sharing=false") == 0
    assert "as the run was begun" not in capsys.readouterr().err
    assert samestep("run", *EMBEDDED) == 0
    said = "batch.prefix_sharing: False, as the run was begun; write it into the recipe to change it"
    assert said in capsys.readouterr().err
    assert samestep("run", *EMBEDDED, "--set", "batch.prefix_sharing=true") == 2
    assert "batch.prefix_sharing: the run has False, the recipe True" in capsys.readouterr().err
    assert samestep("run", *EMBEDDED, "--fresh") == 0
    assert "as the run was begun" not in capsys.readouterr().err


def test_a_dry_run_says_whether_the_run_is_done_or_where_it_would_go_on(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*asked: str) -> str:
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        assert samestep("run", *EMBEDDED, *asked, "--dry-run") == 0
        assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        return capsys.readouterr().out

    more = ["--set", "training.max_steps=16", "--allow", "training.max_steps"]
    run = RunDirectory(tmp_path / "runs" / "embedded")
    assert f"{run.path}: begins at step 0 of 6" in told()
    launcher.saves = (3, 6)
    assert samestep("run", *EMBEDDED) == 0
    done = told()
    assert f"{run.path}: done already, step 6 of 6" in done
    assert "nothing to change" in done
    assert "trainer.train" not in done
    further = told(*more)
    assert f"{run.path}: goes on from checkpoint-6, step 6 of 16" in further
    assert "trainer.train" in further
    assert "the older run is moved aside, and trained from step 0 to 6" in told("--fresh")
    (run.checkpoint(6) / "manifest.json").write_text("{")
    assert "goes on from checkpoint-3, step 3 of 16" in told(*more)
    (run.checkpoint(3) / "manifest.json").write_text("{")
    assert samestep("run", *EMBEDDED, *more, "--dry-run") == 2
    assert "every published checkpoint is damaged (checkpoint-6, checkpoint-3;" in capsys.readouterr().err
    for checkpoint in run.checkpoints():
        shutil.rmtree(checkpoint)
    assert samestep("run", *EMBEDDED, *more, "--dry-run") == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown key": (["--set", "training.lerning_rate=1"], "did you mean training.learning_rate"),
    "wrong type": (["--set", "lora.r=x"], "lora.r"),
    "missing folder": (["--set", "data.dataset=./nowhere"], "data.dataset"),
    "world size": (["--gpus-per-node", "33"], "32 < 33"),
    "strategy": (["--strategy", "zero1"], "single, ddp, fsdp, zero2, zero3"),
    "fsdp on a CPU": (["--strategy", "fsdp"], "fsdp needs GPUs (2 CPU processes asked for)"),
    "two singles": (["--strategy", "single", "--gpus-per-node", "2"], "single is one process"),
    "name": (["--name", "../outside"], "--name"),
    "empty name": (["--name", ""], "--name: '' is not a run name"),
    "budget": (["--set", "batch.micro_batch_tokens=50"], "90 tokens > 50"),
    "no processes": (["--gpus-per-node", "0"], "at least 1"),
    "strategy of an unset variable": (["--strategy", ""], "'' is none of single, ddp,"),
    "strategy typo": (["--strategy", "ddpp"], "did you mean ddp?"),
    "no layer of lora": (["--set", "lora.target_modules=[qproj]"], "did you mean q_proj?"),
    "upload": (["--set", "hub.push=true", "--set", "hub.repo_id=a/b"], "hub.push"),
}


@pytest.mark.parametrize(("asked", "words"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_request_is_refused_with_status_two_and_writes_nothing(
    asked: list[str],
    words: str,
    launcher: Launcher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from launch.inputs.dataset_index import local_dataset

    def read_index(recipe: object) -> Index:
        local_dataset(recipe)  # type: ignore[arg-type]
        return make_index()

    monkeypatch.setattr("launch.local.planned_run.read_index", read_index)
    assert samestep("run", *EMBEDDED, *asked) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert all(";" in line or "did you mean" in line for line in printed.err.splitlines())
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []
    assert launcher.commands == []


def test_a_plan_is_refused_an_empty_strategy_too(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("plan", *EMBEDDED, "--strategy", "") == 2
    assert capsys.readouterr().err == (
        "--strategy: '' is none of single, ddp, fsdp, zero2, zero3, auto; see `samestep plan --help`\n"
    )


def test_more_processes_than_a_cpu_carries_are_refused(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samestep("run", *EMBEDDED)
    write_adapter(Path("runs/embedded/adapter"))
    started = len(launcher.commands)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    for command in (["run", *EMBEDDED, "--fresh"], ["evaluate", "embedded"], ["doctor"]):
        assert samestep(*command, "--gpus-per-node", "9") == 2
        said = capsys.readouterr().err
        assert "--gpus-per-node: 9 processes are too many without GPUs (2 cores for 4 processes each" in said
        assert "give at most 8, or leave it out for 2" in said
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * 10**9))
    assert samestep("evaluate", "embedded", "--gpus-per-node", "3") == 2
    assert "2.0 GB of memory free for 0.7 GB each); give at most 2" in capsys.readouterr().err
    assert len(launcher.commands) == started
    assert samestep("plan", *EMBEDDED, "--gpus-per-node", "9") == 0  # a plan is for any machine


def test_more_processes_than_gpus_are_refused(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_gpus(monkeypatch, 2)
    assert samestep("run", *EMBEDDED, "--gpus-per-node", "4") == 2
    assert "2 < 4" in capsys.readouterr().err
    assert samestep("plan", *EMBEDDED, "--gpus-per-node", "4") == 0  # a plan is for any machine


def test_no_space_is_said_before_anything_is_written(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.local.planned_run.NEEDED_BYTES", 2**62)
    assert samestep("run", *EMBEDDED, "--runs-dir", "deep/er") == 2
    assert "no space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "/proc/samestep",
            "/proc/samestep: cannot be written; give permission, or choose another --runs-dir",
        ),
        ("a-file/runs", "--runs-dir: {folder}/a-file is a file, no folder; choose another --runs-dir"),
        ("a-file", "--runs-dir: {folder}/a-file is a file, no folder; choose another --runs-dir"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(
    place: str, words: str, launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").write_text("")
    assert samestep("run", *EMBEDDED, "--runs-dir", place) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words.format(folder=tmp_path) == line
    assert launcher.commands == []


def test_a_run_that_is_under_way_is_refused(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "embedded"
    folder.mkdir(parents=True)
    with hold_lock(folder):
        assert samestep("run", *EMBEDDED) == 2
    assert "under way" in capsys.readouterr().err
    with hold_lock(folder.parent, ".embedded.lock"):  # another `samestep run`, before its trainer is up
        assert samestep("run", *EMBEDDED) == 2
    assert launcher.commands == []
    assert samestep("run", *EMBEDDED) == 0


def test_a_trainer_that_took_the_lock_meanwhile_is_a_refusal(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    held = ExitStack()
    launcher.marker, launcher.status = None, 1
    launcher.meanwhile = lambda run, _: held.enter_context(hold_lock(run.path))
    with held:
        assert samestep("run", *EMBEDDED) == 2
    assert "under way" in capsys.readouterr().err


def test_a_plain_trainer_that_started_just_before_keeps_its_plan_and_its_markers(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.marker = "STOPPED"
    assert samestep("run", *EMBEDDED) == 0
    before = {file.name: file.read_bytes() for file in Path("runs/embedded").iterdir()}
    with hold_lock(Path("runs/embedded")):
        monkeypatch.setattr(
            "launch.local.planned_run.refuse_if_running", lambda _: None
        )  # it looked a moment too early
        assert samestep("run", *EMBEDDED, "--gpus-per-node", "3") == 2
    assert "under way" in capsys.readouterr().err
    after = {file.name: file.read_bytes() for file in Path("runs/embedded").iterdir()}
    assert {**after, ".lock": b""} == {**before, ".lock": b""}
    assert len(launcher.commands) == 1


def test_missing_data_is_prepared_once_with_the_same_overrides(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([None, make_index()])
    monkeypatch.setattr("launch.local.planned_run.read_index", lambda _: next(found))
    assert samestep("plan", *EMBEDDED) == 0
    (command,) = launcher.commands
    assert command[1:3] == ["-m", "trainer.prepare"]
    assert command[4:] == ["--set", "batch.global_batch_size=32", "--set", "training.max_steps=6"]


@pytest.mark.parametrize("status", [1, 2])
def test_what_prepare_refuses_is_refused(
    status: int, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.planned_run.read_index", lambda _: None)
    launcher.status = status
    assert samestep("run", *EMBEDDED) == status
    assert not Path("runs").exists()


def test_a_base_that_is_gone_is_fetched_before_anything_is_started(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.planned_run.base_is_there", lambda _: False)
    assert samestep("run", *EMBEDDED) == 0
    assert ["trainer.prepare" in command for command in launcher.commands] == [True, False]


def test_evaluate_starts_replicas_over_the_run(launcher: Launcher) -> None:
    samestep("run", *EMBEDDED)
    write_adapter(Path("runs/embedded/adapter"))
    arguments = ["--models", "base,adapter,shuffled", "--split", "validation", "--max-samples", "9"]
    assert samestep("evaluate", "embedded", *arguments, "--gpus-per-node", "3") == 0
    command = launcher.commands[-1]
    assert flag(command, "--num_processes") == "3"
    assert Path(flag(command, "--config_file")).stem == "ddp"
    place = command.index("trainer.evaluation.generate")
    assert command[place + 1 :] == ["--run-dir", str(Path("runs/embedded").absolute()), *arguments]
    assert samestep("evaluate", "runs/embedded", "--gpus-per-node", "1") == 0
    assert Path(flag(launcher.commands[-1], "--config_file")).stem == "single"
    launcher.status = 1
    assert samestep("evaluate", "embedded") == 1


def test_models_that_a_run_does_not_have_are_refused(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    samestep("run", *EMBEDDED)
    shutil.rmtree("runs/embedded/adapter")
    started = len(launcher.commands)
    assert samestep("evaluate", "embedded", "--models", "base,adapter,merged") == 2
    said = capsys.readouterr().err
    for words in (
        "no adapter yet",
        "no merged model yet",
    ):
        assert words in said
    assert len(launcher.commands) == started


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "val"], "--split: 'val' is none of train, validation, test"),
        (["--gpus-per-node", "0"], "--gpus-per-node: '0' cannot be"),
    ],
)
def test_evaluations_of_nothing_are_refused(
    arguments: list[str], words: str, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    samestep("run", *EMBEDDED)
    assert samestep("evaluate", "embedded", *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_run_on_other_data_is_refused_and_stays_as_it_is(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samestep("run", *EMBEDDED)
    before = {file.name: file.read_bytes() for file in Path("runs/embedded").iterdir() if file.is_file()}
    monkeypatch.setattr(
        "launch.local.planned_run.read_index", lambda _: replace(make_index(), fingerprint="e" * 64)
    )
    assert samestep("run", *EMBEDDED) == 2
    assert "data.train.rows: the run has 'ffffffffffff', here it is 'eeeeeeeeeeee'" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in Path("runs/embedded").iterdir() if f.is_file()} == before


def test_merge_merges_and_then_compares(launcher: Launcher) -> None:
    samestep("run", *EMBEDDED)
    assert samestep("merge", "embedded", "--dtype", "float32") == 0
    merged, compared = launcher.commands[-2:]
    folder = str(Path("runs/embedded"))
    output = str(Path("runs/embedded/merged"))
    assert merged[1:] == ["-m", "trainer.export.merge", folder, "--output", output, "--dtype", "float32"]
    assert compared[1:] == ["-m", "trainer.evaluation.compare", "--source", folder, "--merged", output]
    assert samestep("merge", "runs/embedded/adapter", "--output", "elsewhere", "--base-model", "b") == 0
    assert launcher.commands[-2][3:] == [
        "runs/embedded/adapter",
        "--output",
        "elsewhere",
        "--base-model",
        "b",
    ]
    assert launcher.commands[-1][-2:] == ["--base-model", "b"]


def test_the_rounded_base_has_a_folder_of_its_own_and_both_are_compared_when_asked(
    launcher: Launcher,
) -> None:
    samestep("run", *EMBEDDED)
    assert samestep("merge", "embedded", "--base", "dequantized", "--compare") == 0
    merged, compared = launcher.commands[-2:]
    output = str(Path("runs/embedded/merged-dequantized"))
    assert merged[4:] == ["--output", output, "--base", "dequantized"]
    assert compared[-3:] == ["--merged", output, "--both-bases"]
    assert samestep("merge", "embedded", "--output", "elsewhere", "--no-compare") == 0
    assert "trainer.export.merge" in launcher.commands[-1]


def test_consolidate_passes_on_what_a_checkpoint_does_not_say(launcher: Launcher) -> None:
    Path("foreign").mkdir()
    asked = ["foreign", "--output", "adapter", "--lora-alpha", "16", "--base-model", "owner/name"]
    assert samestep("consolidate", *asked) == 0
    assert launcher.commands[-1][1:] == ["-m", "trainer.export.consolidate", *asked]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "foreign", "--output", "x", "--base", "some/model"], "--base-model"),
        (["merge", "foreign", "--output", "x", "--compare"], "lies in no run"),
        (["merge", "foreign"], "--output: missing"),
        (["consolidate", "nothing", "--output", "x"], "no such run or folder"),
        (
            ["merge", "foreign", "--output", "there"],
            "--output: {folder}/there exists already; choose another",
        ),
        (["consolidate", "foreign", "--output", "there"], "--output: {folder}/there exists already; choose"),
        (["consolidate", "foreign", "--output", "there/file/x"], "--output: {folder}/there/file is a file;"),
        (["merge", "foreign", "--output", "busy"], "busy.partial: process {process} on "),
    ],
)
def test_merging_what_cannot_be_is_refused_before_anything_starts(
    launcher: Launcher, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("foreign").mkdir()
    Path("there").mkdir()
    Path("there/file").touch()
    with hold_lock(Path(), ".busy.partial.lock"):
        assert samestep(*arguments) == 2
    assert words.format(folder=Path().absolute(), process=os.getpid()) in capsys.readouterr().err
    assert not launcher.commands


def test_an_adapter_outside_a_run_is_merged_without_comparison(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("foreign").mkdir()
    assert samestep("merge", "foreign", "--output", "elsewhere") == 0
    assert "trainer.export.merge" in launcher.commands[-1]
    assert "not compared" in capsys.readouterr().out


def test_a_failed_merge_is_not_compared(launcher: Launcher) -> None:
    samestep("run", *EMBEDDED)
    launcher.status = 2
    assert samestep("merge", "embedded") == 2
    assert "trainer.evaluation.compare" not in launcher.commands[-1]


@pytest.mark.parametrize("command", ["evaluate", "merge"])
def test_an_unknown_run_is_refused(
    command: str, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep(command, "nothing") == 2
    assert "nothing: no such run" in capsys.readouterr().err
    assert launcher.commands == []


def test_the_ctrl_c_that_kills_is_130_without_a_traceback(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.interrupted, launcher.killed, launcher.marker, launcher.status = True, True, None, -9
    assert samestep("run", *EMBEDDED) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_plan_shows_what_is_left_of_the_stream(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        samestep("plan", "embedded", "--nodes", "2", "--gpus-per-node", "4", "--set", "training.max_steps=-1")
        == 0
    )
    assert "samples left after the last whole step" in capsys.readouterr().out


def test_the_version_names_every_library_that_decides_what_is_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert samestep("--version") == 0
    shown = capsys.readouterr().out
    named = ("samestep", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
    assert shown.startswith("samestep ")
    assert len(shown.splitlines()) == 1
    assert all(f"{name} {importlib.metadata.version(name)}" in shown for name in named)
    assert "deepspeed" in shown
    monkeypatch.setattr("launch.versions.PACKAGES", ["no-such-package"])
    assert version_line().endswith("(no-such-package not installed)")


@pytest.mark.parametrize(
    "arguments", [["plan"], ["prepare"], ["run"], ["evaluate"], ["merge"], ["consolidate"]]
)
def test_every_command_shows_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep(*arguments, "--help") == 0
    shown = capsys.readouterr().out
    assert f"samestep {arguments[0]} " in shown[shown.index("Example:") :]


def test_the_launcher_really_starts_two_processes_on_a_cpu(tmp_path: Path) -> None:
    """What accelerate makes of accelerate_configs/ddp.yaml without a GPU: MULTI_CPU there would start one."""
    (tmp_path / "probe.py").write_text(
        "import os, sys, pathlib\n"
        "pathlib.Path(f\"{sys.argv[1]}-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}\").touch()\n"
    )
    from launch.planning.make_plan import make_plan
    from launch.planning.topology import Topology
    from tests.helpers.indexes import embedded_recipe

    plan = make_plan(embedded_recipe(), make_index(), Topology("ddp", 1, 2, "cpu"))
    command = trainer_command(plan, "probe", ["rank"])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0-of-2", "rank-1-of-2"]


MEETING = ["--main-process-ip", "127.0.0.1", "--main-process-port", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2"], "--main-process-ip, --main-process-port: missing (2 machines)"),
        (
            ["--nodes", "2", "--machine-rank", "2", "--main-process-ip", "a", "--main-process-port", "1"],
            "2 of 2 machines",
        ),
        (["--machine-rank", "1"], "--machine-rank: 1 of 1 machines"),
    ],
)
def test_machines_that_could_not_find_each_other_are_refused_before_anything_is_written(
    launcher: Launcher, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("run", *EMBEDDED, *arguments) == 2
    assert words in capsys.readouterr().err
    assert not launcher.commands
    assert not Path("runs").exists()


def _machine(rank: int) -> list[str]:
    where = ["--main-process-ip", "10.0.0.1", "--main-process-port", "29500"]
    return ["--nodes", "2", "--machine-rank", str(rank), *where]


def test_a_machine_that_is_not_the_first_starts_its_part_of_what_the_first_has_written(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_machine, "JOIN_PATIENCE_S", 0.3)
    written: list[bytes] = []

    def begin_there(run: RunDirectory, _: object) -> None:
        if len(launcher.commands) == 1:  # machine 0 trains
            written.append(run.plan_file.read_bytes())
            assert samestep("run", *EMBEDDED, "--set", "training.learning_rate=1", *_machine(1)) == 0
            written.append(run.plan_file.read_bytes())

    launcher.meanwhile = begin_there
    assert samestep("run", *EMBEDDED, *_machine(0)) == 0
    assert written[0] == written[1]
    assert [flag(command, "--machine_rank") for command in launcher.commands] == ["0", "1"]
    first, second = launcher.commands
    assert first == [
        *second[: second.index("--machine_rank") + 1],
        "0",
        *second[second.index("--machine_rank") + 2 :],
    ]
    for name, value in {"num_machines": "2", "num_processes": "4", "main_process_ip": "10.0.0.1"}.items():
        assert flag(second, f"--{name}") == value
    assert flag(second, "--main_process_port") == "29500"


def test_a_machine_that_is_asked_for_another_part_than_the_first_plans_is_refused(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    returned: list[int] = []
    launcher.meanwhile = lambda *_: returned.append(
        samestep("run", *EMBEDDED, *_machine(1), "--gpus-per-node", "3")
    )
    assert samestep("run", *EMBEDDED, *_machine(0)) == 0
    assert returned == [2]
    said = capsys.readouterr().err
    assert "machine 0 runs ddp on 2 x 2 processes, here ddp on 2 x 3 were asked for" in said
    assert len(launcher.commands) == 1


def test_a_machine_whose_processes_die_first_says_so_although_the_first_still_trains(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    returned: list[int] = []

    def die_there(run: RunDirectory, _: object) -> None:
        if len(launcher.commands) == 1:
            launcher.marker, launcher.status = None, 1
            with hold_lock(run.path):
                returned.append(samestep("run", *EMBEDDED, *_machine(1)))

    launcher.meanwhile = die_there
    samestep("run", *EMBEDDED, *_machine(0))
    assert returned == [1]
    assert "under way" not in capsys.readouterr().err


def test_a_machine_that_is_not_the_first_waits_for_it_and_says_when_it_waits_in_vain(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multi_machine, "JOIN_PATIENCE_S", 0.3)
    in_vain = "--machine-rank: machine 0 has not begun"

    def wait() -> str:
        assert samestep("run", *EMBEDDED, *_machine(1)) == 2
        return capsys.readouterr().err

    said = wait()
    assert said.count("waiting for machine 0 to begin") == 1
    assert in_vain in said
    launcher.marker = "STOPPED"
    assert samestep("run", *EMBEDDED, *_machine(0)) == 0
    assert in_vain in wait()
    with hold_lock(
        Path("runs"), ".embedded.lock"
    ):  # it has the name, and what is written is the last attempt's
        assert in_vain in wait()
    assert len(launcher.commands) == 1


def test_a_machine_hears_within_seconds_that_the_first_was_refused_and_why(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multi_machine, "OLD_REFUSAL_PATIENCE_S", 0.0)
    asked = ["run", *EMBEDDED, "--strategy", "zero1"]
    reason = f"machine 0 did not begin {Path('runs/embedded').absolute()}: --strategy: 'zero1' is none of"
    assert samestep(*asked, *_machine(0)) == 2
    capsys.readouterr()
    assert samestep(*asked, *_machine(1)) == 2  # the first was refused before this one began
    assert reason in capsys.readouterr().err

    monkeypatch.setattr(multi_machine, "OLD_REFUSAL_PATIENCE_S", 60.0)
    monkeypatch.setattr(multi_machine.time, "sleep", lambda _: samestep(*asked, *_machine(0)))
    assert samestep(*asked, *_machine(1)) == 2  # and this time meanwhile
    assert reason in capsys.readouterr().err
    assert samestep("run", *EMBEDDED, *_machine(0)) == 0
    assert {file.name for file in Path("runs").iterdir()} == {".embedded.lock", "embedded"}


def test_a_machine_hears_of_a_first_one_that_was_ended_while_it_prepared(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multi_machine, "OLD_REFUSAL_PATIENCE_S", 0.0)

    def end(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.local.planned_run.read_index", end)
    assert samestep("run", *EMBEDDED, *_machine(0)) == 130
    assert samestep("run", *EMBEDDED, *_machine(1)) == 2
    assert "machine 0 did not begin" in (said := capsys.readouterr().err)
    assert "it ended with KeyboardInterrupt" in said


def test_a_machine_that_is_not_the_first_does_not_wait_for_a_run_that_is_done(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multi_machine, "JOIN_PATIENCE_S", 0.3)
    assert samestep("run", *EMBEDDED, *_machine(0)) == 0
    assert samestep("run", *EMBEDDED, *_machine(1)) == 0
    assert "done (step 6)" in capsys.readouterr().out
    for other in (["--fresh"], ["--set", "training.max_steps=9"]):  # the first machine would begin
        assert samestep("run", *EMBEDDED, *_machine(1), *other) == 2
    assert len(launcher.commands) == 1


def test_fsdp_on_cpus_is_refused_by_plan_too(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", *EMBEDDED, "--strategy", "fsdp", "--gpus-per-node", "2"]
    assert samestep(*words) == 2
    assert "--strategy: fsdp needs GPUs (2 CPU processes asked for)" in capsys.readouterr().err
    set_gpus(monkeypatch, 2)
    assert samestep(*words) == 0


def test_the_rules_are_listed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.rules.checks import rule_rows

    assert samestep("rules") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(rule_rows()) == 38
    assert "offloaded to a CPU" in said
    assert "bitsandbytes#89" in said
    assert all(reason for _, reason in rule_rows())


def run_out_of_memory(run: RunDirectory, _: object) -> None:
    """As a trainer that leaves no marker: plan.json says what the next attempt takes."""
    plan = Plan.from_json(run.plan_file.read_text())
    smaller = replace(plan, micro_batch_tokens=100).with_settings(
        out_of_memory=plan.settings.out_of_memory + 1
    )
    run.plan_file.write_text(smaller.to_json())


def test_a_run_that_ran_out_of_memory_is_started_once_more_with_less(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.marker, launcher.meanwhile = None, run_out_of_memory
    auto = ("--set", "batch.micro_batch_tokens=auto")
    assert samestep("run", *EMBEDDED, *auto) == 1
    assert "once more" in capsys.readouterr().err
    assert len(launcher.commands) == 2
    plan = Plan.from_json(Path("runs/embedded/plan.json").read_text())
    assert (plan.micro_batch_tokens, plan.settings.out_of_memory) == (100, 2)
    # What it came down to holds for the same hardware and wishes, and for no other.
    launcher.marker, launcher.meanwhile = "STOPPED", lambda run, ask: None
    assert samestep("run", *EMBEDDED, *auto) == 0
    assert Plan.from_json(Path("runs/embedded/plan.json").read_text()) == plan
    assert samestep("run", *EMBEDDED, *auto, "--gpus-per-node", "3") == 0
    assert Plan.from_json(Path("runs/embedded/plan.json").read_text()).micro_batch_tokens == 360
    assert samestep("run", *EMBEDDED, "--set", "batch.micro_batch_tokens=200") == 0
    assert Plan.from_json(Path("runs/embedded/plan.json").read_text()).micro_batch_tokens == 200


def test_a_run_that_fails_otherwise_is_not_started_again(launcher: Launcher) -> None:
    launcher.marker = None
    assert samestep("run", *EMBEDDED) == 1
    assert len(launcher.commands) == 1


def test_a_plan_shows_what_fits_gpus_that_are_not_here(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: SHAPE)
    auto = [
        word
        for key in ("model.dtype=bfloat16", "training.gradient_checkpointing=auto")
        for word in ("--set", key)
    ]
    assert samestep("plan", *EMBEDDED, *auto, "--gpus-per-node", "2", "--gpu-memory", "24GB") == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 (1 x 2 GPU)" in said
    assert "memory of GPUs of 24.0 GiB, 2 processes" in said
    assert "zero3" in said
    assert samestep("plan", *EMBEDDED, "--gpu-memory", "much") == 2
    assert "24GB" in capsys.readouterr().err


def test_the_commands_that_are_printed_work_as_they_were_typed(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    program = tmp_path / "my venv" / "bin" / "samestep"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setenv("SAMESTEP_COMMAND", "of another one")

    def said(*typed: str) -> str:
        monkeypatch.setattr("sys.argv", list(typed))
        with suppress(SystemExit):
            main.main()
        printed = capsys.readouterr()
        return printed.out + printed.err

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "`'my venv/bin/samestep' run` or" in said(str(program), "status")
    assert "see `'my venv/bin/samestep' plan --help`" in said(
        str(program), "plan", *EMBEDDED, "--strategy", "x"
    )
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert "`samestep run` or" in said(str(program), "status")
    assert "`samestep run` or" in said("samestep", "status")
    assert "SAMESTEP_COMMAND" not in os.environ


def test_plan_checkpoints_and_rules_print_json(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("plan", *EMBEDDED, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]["max_steps"] == 6
    assert {row["strategy"] for row in shown["memory"]} <= {"ddp", "fsdp", "zero2", "zero3"}
    assert samestep("rules", "--json") == 0
    assert all(row["rule"] and row["why"] for row in json.loads(capsys.readouterr().out))
    (tmp_path / "runs" / "old" / "checkpoint-3").mkdir(parents=True)
    assert samestep("checkpoints", "old", "--json") == 1
    (checkpoint,) = json.loads(capsys.readouterr().out)
    assert (checkpoint["step"], checkpoint["state"]) == (3, "damaged")
    assert checkpoint["problems"]


def test_a_plan_for_other_gpus_says_how_many_processes_it_counts(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("plan", *EMBEDDED, "--gpu-memory", "24GB") == 0
    assert "planned for 2 processes a node" in capsys.readouterr().err
    assert samestep("plan", *EMBEDDED, "--gpu-memory", "24GB", "--gpus-per-node", "4") == 0
    assert capsys.readouterr().err == ""


def test_what_a_child_has_said_is_not_said_again(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.local.planned_run.read_index", lambda _: None)
    launcher.status = 2
    assert samestep("run", *EMBEDDED) == 2
    assert capsys.readouterr().err == ""
    launcher.status = -9
    assert samestep("run", *EMBEDDED) == 1
    assert "python -m trainer.prepare: was ended by SIGKILL" in capsys.readouterr().err


def test_the_shell_completes_recipes_and_runs_and_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text("{}")

    def complete(words: str) -> list[str]:
        variables = {"_SAMESTEP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
        return _shell("samestep", tmp_path, variables).splitlines()

    assert complete("samestep status m") == ["mine"]
    assert complete("samestep logs o") == ["other"]
    assert complete("samestep plan embed") == ["embedded"]
    assert "samestep" in _shell("samestep --show-completion bash", tmp_path, BASH)
    assert _shell("samestep rules | head -1; echo ${PIPESTATUS[0]}", tmp_path).splitlines()[-1] == "0"


BASH = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
"""Typer takes the shell that is named, not the one that it finds above this process: there may be none."""


def _shell(command: str, folder: Path, variables: dict[str, str] | None = None) -> str:
    environment = {**os.environ, **(variables or {})}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout


def test_output_goes_on_where_its_encoding_lacks_a_character_and_where_columns_is_0(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli.main"]
    odd = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "0"}
    file = tmp_path / "ä.yaml"
    said = [
        subprocess.run([*command, *words], capture_output=True, env=odd, check=False, cwd=tmp_path)
        for words in (["init", str(file), "--data", "embedded"], ["rules"])
    ]
    assert [each.returncode for each in said] == [0, 0], said[0].stderr
    assert rb"\xe4.yaml: written" in said[0].stdout
    assert b"what is refused" in said[1].stdout


def test_a_current_folder_that_is_gone_and_folders_that_are_a_loop_are_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    status = f"{shlex.quote(sys.executable)} -m launch.cli.main"
    for words, reason in (
        (f"cd gone && rmdir ../gone && {status} status", "current folder: was removed; change to one"),
        (f"{status} run embedded --runs-dir loop", "Too many levels of symbolic links; choose another place"),
    ):
        ended = subprocess.run(
            ["bash", "-c", words], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert ended.returncode == 2
        (line,) = ended.stderr.splitlines()
        assert reason in line
        assert "lock" not in line.partition(":")[2]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "give permission, or choose another place"),
        (errno.ENOSPC, "make room, or choose another place"),
        (errno.EROFS, "; choose another place"),
    ],
)
def test_an_error_of_the_disk_is_said_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, remedy: str
) -> None:
    def fail(**_: object) -> None:
        raise OSError(number, os.strerror(number), "/a/place")

    monkeypatch.setattr(main, "app", fail)
    assert samestep("status") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"/a/place: {os.strerror(number)}")
    assert f"{remedy}\n" in said


def test_a_want_of_memory_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(main, "app", fail)
    assert samestep("status") == 1
    assert capsys.readouterr().err.startswith("memory: this process was given no more; end other processes")


def test_a_ctrl_c_while_the_command_is_imported_shows_no_traceback() -> None:
    words = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from launch.cli.main import main\n"
    )
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
