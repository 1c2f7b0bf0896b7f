"""What another job's launcher left in the environment reaches no child, and is judged before anybody is dialled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.launcher_variables import PARENT, refuse_odd_launch
from launch.subprocesses import wait_for
from trainer.train import main as train

WHOLE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.9",
    "MASTER_PORT": "29500",
}


def test_a_child_gets_nothing_of_another_jobs_launcher_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stale = {**WHOLE, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "PET_NNODES": "4", "PMI_SIZE": "2"}
    stale |= {"TORCHELASTIC_RUN_ID": "7", "PARALLELISM_CONFIG_TP_SIZE": "2", "GROUP_RANK": "1"}
    for name, value in stale.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    program = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    for _ in range(2):
        wait_for([sys.executable, "-c", program, str(tmp_path / "seen")])
    seen = json.loads((tmp_path / "seen").read_text())
    assert not stale.keys() & seen.keys()
    assert seen["SLURM_JOB_ID"] == "12"
    assert seen[PARENT] == str(os.getpid())
    said = capfd.readouterr().err
    assert said.count("environment: not passed on:") == 1
    assert all(name in said for name in stale)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"RANK": "x"}, "RANK: 'x' is no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "RANK": "2"}, "RANK: 2 of WORLD_SIZE 2"),
        ({**WHOLE, "MASTER_PORT": "tcp"}, "MASTER_PORT: 'tcp' is no number"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE: '-1' is no number"),
    ],
)
def test_a_place_among_others_that_cannot_be_is_refused(told: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        refuse_odd_launch(told)
    assert why in str(raised.value)
    assert "\n" not in why


def test_a_plain_start_is_judged_first_and_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")  # whoever is not the first would leave the word to that one
    assert train(["embedded"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: environment: LOCAL_RANK, WORLD_SIZE without RANK, MASTER_ADDR, MASTER_PORT"
    )
    assert said.count("\n") == 1


def test_what_a_launcher_says_to_its_children_alone_is_taken_and_what_it_was_given_itself_is_not() -> None:
    judge = (
        "import os; from launch.launcher_variables import refuse_odd_launch\n"
        "try: refuse_odd_launch(os.environ); print('fine')\n"
        "except Exception as error: print(error)"
    )
    launcher = (
        f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {judge!r}], env=os.environ)"
    )
    says = f"import os; os.environ.update({WHOLE!r}); {launcher}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(program: str, **more: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True).stdout

    assert run(says) == "fine\n"
    assert run(launcher) == "fine\n"  # nothing was said at all
    assert "were there before the launcher began (another job's: 10.0.0.9:29500)" in run(launcher, **WHOLE)
