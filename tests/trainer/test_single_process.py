"""`trainer.single_process`: one process gets from us what it would get from `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch

from benchmarks.launching import ROOT
from launch.local.accelerate_command import launch_command
from launch.planning.make_plan import make_plan
from launch.planning.topology import Topology
from tests.helpers.indexes import embedded_recipe, make_index
from trainer.single_process import without_accelerate

SINGLE = ROOT / "accelerate_configs" / "single.yaml"
CALLER = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def arguments_of(strategy: str = "single", processes: int = 1, threads: int | None = None) -> list[str]:
    plan = make_plan(embedded_recipe(), make_index(), Topology(strategy, 1, processes, "cuda"))
    command = launch_command(
        plan,
        config_file=ROOT / "accelerate_configs" / f"{strategy}.yaml",
        module="trainer.train",
        module_args=["--run-dir", "runs/a b", "--module"],
        port=4711,
        cpu_threads=threads,
    )
    return command[3:]


@pytest.mark.parametrize(("threads", "caller"), [(None, {}), (3, {}), (None, {"OMP_NUM_THREADS": "5"})])
def test_one_process_gets_the_command_and_the_environment_of_accelerate(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, caller: dict[str, str]
) -> None:
    arguments, environment = arguments_of(threads=threads), CALLER | caller
    monkeypatch.setattr(os, "environ", environment)
    parsed, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    assert without_accelerate(arguments, environment) == launch.prepare_simple_launcher_cmd_env(parsed)


def test_what_is_more_than_one_plain_process_is_left_to_accelerate(tmp_path: Path) -> None:
    arguments = arguments_of()
    assert without_accelerate(arguments, CALLER)
    (edited := tmp_path / "single.yaml").write_text(SINGLE.read_text().replace("'no'", "bf16"))
    (damaged := tmp_path / "damaged.yaml").write_text("a: [")
    for file in (edited, damaged, tmp_path / "missing.yaml"):
        other = [str(file) if word == str(SINGLE) else word for word in arguments]
        assert without_accelerate(other, CALLER) is None
    for other in (
        arguments_of("ddp", 2),
        arguments_of("ddp", 1),
        ["--cpu", *arguments],
        ["--debug", "true", *arguments],
        arguments[2:],
        [word for word in arguments if word != "--module"],
    ):
        assert without_accelerate(other, CALLER) is None


def test_the_launcher_of_one_process_imports_neither_torch_nor_accelerate() -> None:
    program = (
        "import os, sys, trainer.launcher as launcher\n"
        "sys.argv[1:] = " + repr([*arguments_of()[:-4], "tests.helpers.ending", "0"]) + "\n"
        "try:\n    launcher.main()\n"
        "except SystemExit as ended:\n    print(ended.code, {'torch', 'accelerate'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["0", "set()"]
