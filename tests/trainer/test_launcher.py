"""`python -m trainer.launcher`: how it ends when its ranks failed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.launching import ROOT


@pytest.mark.parametrize(
    ("config", "processes", "ending", "status", "words"),
    [
        ("single", 1, "2", 2, ""),
        ("single", 1, "-9", 1, "rank 0: was ended by signal 9 (Killed)"),
        ("ddp", 2, "2", 2, ""),
        ("single", 1, "3", 1, "rank 0: ended with status 3"),
        ("ddp", 2, "-9", 1, "was ended by signal 9 (Killed)"),
    ],
)
def test_a_rank_that_failed_gives_the_status_and_no_traceback(
    config: str, processes: int, ending: str, status: int, words: str
) -> None:
    command = [
        sys.executable,
        "-m",
        "trainer.launcher",
        "--num_processes",
        str(processes),
        *(["--cpu"] if processes > 1 else []),
    ]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    command += ["--num_machines", "1", "--main_process_port", "0", "--module"]
    ended = subprocess.run(
        [*command, "tests.helpers.ending", ending], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert ended.returncode == status, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
