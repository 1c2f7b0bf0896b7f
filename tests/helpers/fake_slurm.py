"""Stand-ins for Slurm's commands, first in PATH: they write down how they were called, and answer as told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class FakeSlurm:
    """`answers`: a folder with one file for each command, a shell script."""

    folder: Path

    def answer(self, command: str, script: str) -> None:
        """What a command does, with `$*` as its arguments."""
        program = self.folder / command
        log = self.folder / f"{command}.log"
        program.write_text(f"#!/bin/bash\necho \"$*\" >>'{log}'\n{script}\n")
        program.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        log = self.folder / f"{command}.log"
        return log.read_text().splitlines() if log.exists() else []


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeSlurm:
    """sbatch counts its jobs from 41 on; scontrol knows no job, sinfo no node."""
    folder.mkdir()
    fake = FakeSlurm(folder)
    fake.answer("sbatch", f"echo $((40 + $(wc -l <'{folder}/sbatch.log')))")
    fake.answer("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake.answer("sinfo", "exit 1")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return fake
