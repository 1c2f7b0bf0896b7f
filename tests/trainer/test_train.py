"""One process: what a run directory holds, what is refused, and what must not change a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.errors import ConfigError, RunError, SamestepError
from launch.inputs.dataset_index import row_digest
from launch.planning.make_plan import make_plan
from launch.planning.plan import Plan
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.rules.accelerate_config import LaunchConfig
from launch.run.directory import RunDirectory, read_marker
from launch.run.lock import hold_lock
from tests.conftest import recipe_values
from trainer.checks.training import check_adapters, check_finite
from trainer.distributed.collectives import report_error
from trainer.metrics_log import append_line, keep_lines_until, read_lines, samples_digest, step_rows_digest
from trainer.train import main


def _write(world: Path, file: Path, **changes: dict[str, Any]) -> Path:
    values = recipe_values(world)
    values["quantization"]["load_in_4bit"] = True
    values["training"]["max_steps"] = 3
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change
    file.write_text(dump_recipe(recipe_from_dict(values)))
    return file


def _train(recipe: Path, name: str, *more: str) -> int:
    return main([str(recipe), "--runs-dir", str(recipe.parent), "--name", name, *more])


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished NF4 run of 3 steps, evaluated once at its end."""
    folder = tmp_path_factory.mktemp("done")
    recipe = _write(world, folder / "recipe.yaml", evaluation={"every_steps": 100})
    assert _train(recipe, "run") == 0
    return RunDirectory(folder / "run")


def _copy(done: RunDirectory, folder: Path) -> RunDirectory:
    shutil.copytree(done.path, folder / "run")
    return RunDirectory(folder / "run")


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """What is in a folder, with the number and the last change of every file: a rewritten one is another."""
    return {
        path: (status.st_ino, status.st_mtime_ns) for path in folder.rglob("*") if (status := path.stat())
    }


def test_the_run_directory_holds_all_there_is_to_know(done: RunDirectory) -> None:
    marker = read_marker(done)
    assert marker is not None
    assert (marker.kind, marker.text) == ("DONE", "step 3")
    names = {entry.name for entry in done.path.iterdir() if not entry.name.startswith(".")}
    assert names == {
        "recipe.yaml",
        "plan.json",
        "environment.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "adapter",
        "checkpoint-3",
        "logs",
        "DONE",
    }
    line = read_lines(done.metrics_file)[0]
    assert list(line) == [
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "target_tokens",
        "tokens",
        "samples",
        "samples_digest",
        "seconds",
    ]
    environment = json.loads(done.environment_file.read_text())
    assert environment["versions"]["torch"] == version("torch")
    total, *parts = environment["first_step"].items()
    assert total == ("total", pytest.approx(sum(seconds for _, seconds in parts), abs=0.1))
    assert {"imports", "base", "trainer", "wrapping", "step"} <= {part for part, _ in parts}


def test_a_finished_run_started_again_stays_as_it_is(done: RunDirectory, tmp_path: Path) -> None:
    run = _copy(done, tmp_path)
    before = files_of(run.path)
    assert main(["--run-dir", str(run.path)]) == 0
    assert main([str(run.recipe_file), "--runs-dir", str(tmp_path), "--name", "run"]) == 0
    assert files_of(run.path) == before
    (run.path / "DONE").unlink()  # killed just before it said so: it says so now, and writes the same
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert main(["--run-dir", str(run.path)]) == 0
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter
    assert files_of(run.path) != before
    assert read_marker(run) == read_marker(done)
    (run.adapter / "adapter_model.safetensors").write_bytes(
        adapter[:100]
    )  # it is not all there: it comes again
    assert main(["--run-dir", str(run.path)]) == 0
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter


def test_evaluating_in_between_does_not_change_the_training(
    world: Path, done: RunDirectory, tmp_path: Path
) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs; the gradient is lost then."""
    recipe = _write(world, tmp_path / "recipe.yaml", evaluation={"every_steps": 1})
    assert _train(recipe, "run") == 0
    run = RunDirectory(tmp_path / "run")
    assert len(read_lines(run.evaluations_file)) == 3
    assert [line["loss"] for line in read_lines(run.metrics_file)] == [
        line["loss"] for line in read_lines(done.metrics_file)
    ]
    shas = [
        hashlib.sha256((r.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        for r in (run, done)
    ]
    assert shas[0] == shas[1]


def test_dropout_is_on_and_follows_the_seed(world: Path, done: RunDirectory, tmp_path: Path) -> None:
    recipe = _write(
        world, tmp_path / "recipe.yaml", lora={"lora_dropout": 0.0}, evaluation={"every_steps": 100}
    )
    assert _train(recipe, "run") == 0
    without, with_dropout = (read_lines(run.metrics_file) for run in (RunDirectory(tmp_path / "run"), done))
    assert without[0]["loss"] == with_dropout[0]["loss"]  # LoRA adds nothing before its first step
    assert without[0]["grad_norm"] != with_dropout[0]["grad_norm"]


def test_a_changed_cadence_holds_from_the_resumption_on(world: Path, tmp_path: Path) -> None:
    every = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}, "evaluation": {"every_steps": 2}}
    recipe = _write(world, tmp_path / "recipe.yaml", **every)
    assert _train(recipe, "run") == 0
    run = RunDirectory(tmp_path / "run")
    shutil.rmtree(run.checkpoint(4))
    shutil.rmtree(run.adapter)  # without its result it is not done
    recipe = _write(world, tmp_path / "recipe.yaml", **every | {"evaluation": {"every_steps": 1}})
    assert _train(recipe, "run") == 0
    assert [line["step"] for line in read_lines(run.evaluations_file)] == [2, 3, 4]


def test_figures_that_find_no_room_stop_the_run_with_a_message(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, values: object) -> None:
        raise OSError(28, "No space left on device", str(file))

    recipe = _write(world, tmp_path / "recipe.yaml")
    monkeypatch.setattr("trainer.loop.callbacks.append_line", full)
    assert _train(recipe, "run") == 1
    said = capsys.readouterr().err
    assert "metrics.jsonl: No space left on device (disk at " in said
    assert " MB free); make room" in said


def test_what_is_refused_after_the_start_of_a_new_run_leaves_no_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("lora.r: cannot be; choose another")

    recipe = _write(world, tmp_path / "recipe.yaml")
    monkeypatch.setattr("trainer.train.train", refuse)
    assert _train(recipe, "run") == 2
    assert "lora.r: cannot be" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("run") if path.is_dir()]


def test_rows_that_changed_behind_the_index_stop_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.data.rows import Row
    from trainer.data.splits import Rows

    read = Rows.__getitem__

    def shifted(self: Rows, number: int) -> Row:
        return read(self, (number + 1) % len(self))

    recipe = _write(world, tmp_path / "recipe.yaml")
    monkeypatch.setattr(Rows, "__getitem__", shifted)
    assert _train(recipe, "run") == 1
    assert "is not what `samestep prepare` saw" in capsys.readouterr().err


def test_a_base_that_lacks_tensors_or_is_another_model_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "base", tmp_path / "holes")
    tensors = load_file(tmp_path / "holes" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    recipe = _write(world, tmp_path / "a.yaml", model={"name_or_path": str(tmp_path / "holes")})
    assert _train(recipe, "a") == 2
    assert "(3 tensors are missing, unknown or of another shape" in capsys.readouterr().err
    shutil.copytree(world / "base", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl_moe"}))
    recipe = _write(world, tmp_path / "b.yaml", model={"name_or_path": str(tmp_path / "other")})
    assert _train(recipe, "b") == 2
    assert "is a qwen3_vl_moe: a mixture of experts" in capsys.readouterr().err


def test_another_recipe_in_the_same_run_is_refused_with_the_values(
    world: Path, done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    recipe = _write(world, tmp_path / "recipe.yaml", lora={"r": 4}, training={"seed": 7})
    kept = run.recipe_file.read_bytes()
    assert _train(recipe, "run") == 2
    said = capsys.readouterr().err
    assert "lora.r: the run has 8, the recipe 4" in said
    assert "training.seed: the run has 42, the recipe 7" in said
    assert run.recipe_file.read_bytes() == kept


def test_a_run_whose_recipe_was_edited_is_refused_with_the_values(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    edited = run.recipe_file.read_text().replace("lora_alpha: 16", "lora_alpha: 32")
    run.recipe_file.write_text(edited)
    before = files_of(run.path)
    assert main(["--run-dir", str(run.path)]) == 2  # nothing changes of a run that is done
    assert "lora.lora_alpha: the run has 16, the recipe 32" in capsys.readouterr().err
    assert files_of(run.path) == before
    (run.path / "DONE").unlink()
    assert main(["--run-dir", str(run.path)]) == 2
    assert "lora.lora_alpha: the run has 16, the recipe 32" in capsys.readouterr().err
    marker = read_marker(run)
    assert marker is not None
    assert marker.kind == "REFUSED"
    assert "--allow lora.lora_alpha" in marker.text


def test_a_run_under_way_is_refused(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    with hold_lock(run.path):
        assert main(["--run-dir", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert "this run is under way (process" in said
    assert "Traceback" not in said


def test_what_is_refused_before_the_run_is_taken_leaves_its_reason_for_who_waits(
    done: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _copy(done, tmp_path)
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps({**plan, "dataset_fingerprint": "0" * 64}))
    found = []

    def part(error: SamestepError) -> int:  # from here on the other ranks look for the reason
        found.append(read_marker(run))
        return report_error(error)

    monkeypatch.setattr("trainer.train.report_error", part)
    assert main(["--run-dir", str(run.path), "--marker-decides"]) == 0
    (marker,) = found
    assert marker is not None
    assert marker.kind == "REFUSED"
    assert "was made for other data" in marker.text
    with hold_lock(run.path):  # of somebody else's run there is nothing to say
        (run.path / "REFUSED").unlink()
        assert main(["--run-dir", str(run.path), "--marker-decides"]) == 2
    assert read_marker(run) is None


def test_a_plan_for_more_processes_than_were_launched_stops(
    done: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps(plan | {"world_size": 2, "strategy": "ddp", "gpus_per_node": 2}))
    assert main(["--run-dir", str(run.path)]) == 1
    assert "the launcher started 1 processes, the plan is for 2" in capsys.readouterr().err


def test_a_plan_for_another_strategy_than_was_launched_stops_before_anything_is_loaded(
    done: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(done, tmp_path)
    monkeypatch.setattr("trainer.train.train", lambda *_: pytest.fail("went on"))
    run.plan_file.write_text(json.dumps(json.loads(run.plan_file.read_text()) | {"strategy": "zero3"}))
    assert main(["--run-dir", str(run.path)]) == 1
    assert "--config_file: it launches single, the plan is for zero3; take " in capsys.readouterr().err
    for module in ("setup", "distributed.process_group"):
        monkeypatch.setattr(
            f"trainer.{module}.launched_config",
            lambda _: LaunchConfig("here", deepspeed={"zero_optimization": {"stage": 2}}),
        )
    assert main(["--run-dir", str(run.path)]) == 1
    assert "it launches zero2, the plan is for zero3" in capsys.readouterr().err


def test_packages_and_gpus_that_the_plan_did_not_know_are_judged_where_it_trains(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _write(world, tmp_path / "recipe.yaml", model={"dtype": "bfloat16"})
    monkeypatch.setattr("trainer.train.train", lambda *_: pytest.fail("went on"))
    monkeypatch.setattr("trainer.distributed.process_group.capability_of", lambda _: (7, 5))
    assert _train(recipe, "run") == 2
    assert "model.dtype: bfloat16 on a GPU of compute capability 7.5" in capsys.readouterr().err
    monkeypatch.setattr("trainer.distributed.process_group.capability_of", lambda _: None)
    monkeypatch.setattr("launch.run.planned.make_plan", partial(_plan_elsewhere, make_plan))
    monkeypatch.setattr("launch.rules.machine_rules._installed", lambda: {"accelerate": "1.14.2"})
    assert _train(recipe, "run") == 2
    assert "versions: too old (accelerate 1.14.2 < 1.15)" in capsys.readouterr().err


def _plan_elsewhere(make: Callable[..., Plan], *arguments: Any, **named: Any) -> Plan:
    recipe, index, topology = arguments
    return make(recipe, index, replace(topology, packages_here=False), **named)


def test_adapters_stay_in_fp32_in_memory_and_on_disk(done: RunDirectory) -> None:
    from safetensors.torch import load_file

    stored = load_file(done.adapter / "adapter_model.safetensors")
    assert stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_the_adapter_loads_with_peft_alone(world: Path, done: RunDirectory) -> None:
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    base = Qwen2VLForConditionalGeneration.from_pretrained(world / "base")
    model = PeftModel.from_pretrained(base, str(done.adapter))
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 4  # q_proj and v_proj of 2 layers
    assert all(parameter.abs().max() > 0 for parameter in trained)


def test_plan_files_of_another_version_are_refused(done: RunDirectory, tmp_path: Path) -> None:
    run = _copy(done, tmp_path)
    run.plan_file.write_text("{}")
    assert main(["--run-dir", str(run.path)]) == 2


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_a_non_finite_step_names_its_samples(loss: float, norm: float) -> None:
    with pytest.raises(RunError, match=r"step 7: .*the step's samples are \[3, 5\]"):
        check_finite(loss, norm, 7, [3, 5])
    check_finite(1.0, 1.0, 7, [3, 5])


def test_half_precision_adapters_and_trained_bases_are_refused() -> None:
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    full = torch.nn.Parameter(torch.zeros(2))
    for parameters, words in (
        ({"a.lora_A.weight": half}, "not float32"),
        ({"a.weight": full}, "only LoRA weights may"),
        ({}, "nothing trains"),
    ):
        with pytest.raises(RunError, match=words):
            check_adapters(parameters)
    check_adapters({"a.lora_A.weight": full})


def test_later_lines_and_half_lines_go_when_a_run_resumes(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_line(file, {"step": step})
    with file.open("a") as handle:
        handle.write('{"step": 6, "lo')
    assert list(keep_lines_until(file, 3).flaws(range(1, 4))) == []
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3]


def test_lost_and_doubled_lines_are_named_and_of_each_step_one_is_left(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(1, 11)]
    lines[2] = lines[2][:9]  # cut
    lines[4] = "[" * 20000
    lines[5] = '{"loss": 3}'
    lines[6:7] = []
    lines.insert(1, json.dumps({"step": 1, "loss": 9}))
    lines.append("\udcff")
    file.write_text("\n".join(lines), errors="surrogateescape")
    kept = keep_lines_until(file, 9)
    assert [(line["step"], line["loss"]) for line in read_lines(file)] == [
        (1, 9),
        (2, 1),
        (4, 2),
        (8, 4),
        (9, 4.5),
    ]
    doubled, lost = kept.flaws(range(1, 10))
    assert f"{file}: had more than one line of step 1; the last of each is kept" == doubled
    assert lost.startswith(f"{file}: has no whole line of steps 3, 5-7 (lost or damaged: 4)")
    assert list(keep_lines_until(file, 9).flaws()) == []
    file.unlink()
    (lost,) = keep_lines_until(file, 9).flaws(range(1, 3))
    assert "has no whole line of steps 1-2 (" in lost


def test_the_digest_of_a_step_does_not_know_the_order_and_that_of_rows_not_their_places() -> None:
    assert samples_digest([3, 1, 2]) == samples_digest([1, 2, 3]) != samples_digest([1, 2, 4])
    rows = [row_digest(bytes([number]), "why", ["so"]) for number in range(4)]
    assert step_rows_digest(rows[:3]) == step_rows_digest(rows[2::-1]) != step_rows_digest(rows[1:])


def test_plans_survive_their_file(done: RunDirectory) -> None:
    plan = Plan.from_json(done.plan_file.read_text())
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()
