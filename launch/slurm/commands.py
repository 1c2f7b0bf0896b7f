"""Slurm's commands, as the login node calls them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from launch.errors import ConfigError, UnansweredError
from launch.slurm.output import JobFacts, parse_job, parse_job_id
from launch.slurm.sbatch_options import overriding_variables

_PATIENCE_S = 120
# What a shell inside another allocation would pass on about that one, and what changes the form of an answer: as in
# slurm/train.sbatch. Variables of sbatch are judged one by one.
_OF_ANOTHER_JOB = ("SLURM_", "SRUN_", "PMI", "SBATCH_JOB_", "SQUEUE_", "SINFO_", "SCONTROL_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")


def sbatch(script: Path, text: str, *options: str) -> str:
    """Submit a script of this `text`; returns the job id.

    Raises:
        ConfigError: sbatch refuses, in its words.
        UnansweredError: nobody knows whether the job is queued.
    """
    done = _slurm("sbatch", "--parsable", *options, str(script), without=overriding_variables(text))
    if done.returncode:
        words = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()]
        said = "; ".join(word for word in words if word.strip()) or "without a word"
        if "timed out" in said:  # of sbatch, not of the controller, which may have taken the job
            raise UnansweredError(
                f"sbatch: no answer about {script.name} ({said}); see `squeue` whether the job is there before you "
                "submit again"
            )
        if "contact slurm controller" in said:
            raise ConfigError(
                f"sbatch: cannot reach the Slurm controller ({said}); submit again when `scontrol ping` says it is up"
            )
        raise ConfigError(
            f"sbatch: refused {script.name} (exit status {done.returncode}): {said}; "
            "see `sinfo` and `sacctmgr show assoc` for what you may use"
        )
    return parse_job_id(done.stdout)


def show_job(job: str) -> JobFacts | None:
    """What Slurm knows of a job; None when it knows nothing, or there is no Slurm here."""
    return parse_job(_answer("scontrol", "show", "job", "-o", job), job)


def most_cpus(partition: str | None) -> int | None:
    """CPUs of the largest node of a partition, or of all; None where Slurm does not say."""
    chosen = [f"--partition={partition}"] if partition else []
    counts = re.findall(
        r"^\s*(\d+)\s*$", _answer("sinfo", "--noheader", "--Node", *chosen, "--format=%c"), re.M
    )
    return max(map(int, counts), default=None)


def _answer(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = _slurm(*command)
    except ConfigError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _slurm(*command: str, without: Collection[str] = ()) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or (not name.startswith(_OF_ANOTHER_JOB) and name not in without)
    }
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError(f"{command[0]}: not found in PATH; run this where Slurm is installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnansweredError(
            f"{command[0]}: gives no answer ({error}); is the controller up? see `scontrol ping`"
        ) from None
