"""The samestep command in this process, with a stand-in for every child that it would start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.checkpoints.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launch.cli import main
from launch.inputs.identity import data_identity
from launch.planning.plan import Plan
from launch.recipe.loading import load_recipe
from launch.run.directory import MarkerKind, RunDirectory, write_marker
from launch.subprocesses import Ended
from tests.helpers.attempts import save_step
from tests.helpers.indexes import make_index

EMBEDDED = ["embedded", "--set", "batch.global_batch_size=32", "--set", "training.max_steps=6"]


@dataclass
class Launcher:
    """Stands in for every child: records its command, saves the steps it is told to, and ends as it is told.

    `meanwhile`: called with the run and what a signal would call, while the trainer would run; `beside`: while any
    other child would.
    """

    status: int = 0
    marker: MarkerKind | None = "DONE"
    text: str = ""
    interrupted: bool = False
    killed: bool = False
    saves: Sequence[int] = ()
    meanwhile: Callable[[RunDirectory, Callable[[int], None]], None] = lambda run, ask: None
    beside: Callable[[], None] = lambda: None
    commands: list[list[str]] = field(default_factory=list)
    environments: list[Mapping[str, str] | None] = field(default_factory=list)

    def __call__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        ask_to_stop: Callable[[int], None] | None = None,
    ) -> Ended:
        self.commands.append(list(command))
        self.environments.append(environment)
        if "trainer.train" in command:
            assert ask_to_stop is not None
            self._train(RunDirectory(Path(flag(self.commands[-1], "--run-dir"))), ask_to_stop)
        else:
            self.beside()
        return Ended(self.status, self.interrupted, self.killed)

    def _train(self, run: RunDirectory, ask_to_stop: Callable[[int], None]) -> None:
        plan, recipe = Plan.from_json(run.plan_file.read_text()), load_recipe(run.recipe_file)
        self.meanwhile(run, ask_to_stop)
        for step in self.saves:
            save_step(run, recipe, plan, step)
        if self.marker == "DONE":
            write_adapter(run.adapter)
        if self.marker:
            write_marker(run, self.marker, self.text or f"step {plan.max_steps}")


def write_adapter(folder: Path, value: float = 1.0) -> None:
    """The files of an adapter, with two small tensors of `value`."""
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text("{}")
    tensors = {"b": np.full((2, 3), value, np.float32), "a": np.full(4, value, np.float16)}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Launcher:
    """A machine of two CPU processes with prepared data; the working folder is `folder`."""
    fake = Launcher()
    monkeypatch.chdir(folder)
    for module in ("local.launcher", "local.postprocess", "export.gguf"):
        monkeypatch.setattr(f"launch.{module}.wait_for", fake)
    monkeypatch.setattr("launch.subprocesses.wait_for", fake)
    monkeypatch.setattr("launch.local.planned_run.read_index", lambda _: make_index())
    monkeypatch.setattr("launch.local.planned_run.base_is_there", lambda _: True)
    monkeypatch.setattr("launch.inputs.identity.find_identity", lambda _, index: data_identity(index))
    monkeypatch.setattr("launch.planning.make_plan.read_shape", lambda _: "no base here")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    set_gpus(monkeypatch, 0)
    return fake


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    uuids = [f"GPU-{number:08x}" for number in range(count)]
    monkeypatch.setattr("launch.hardware._gpus_of_driver", lambda: uuids)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def samestep(*arguments: str) -> int:
    """Run a command line in this process; returns its exit status."""
    before, sys.argv = sys.argv, ["samestep", *arguments]
    try:
        main.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]
