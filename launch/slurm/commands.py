"""Slurm's commands, as the login node calls them, and the options of sbatch that a site file may give."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

from launch.errors import ConfigError, UnansweredError
from launch.slurm.output import JobFacts, parse_job, parse_job_id

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
        message = "; ".join(word for word in words if word.strip()) or "without a word"
        if "timed out" in message:  # of sbatch, not of the controller, which may have taken the job
            raise UnansweredError(
                f"sbatch: no answer about {script.name} ({message}); see `squeue` whether the job is there before you "
                "submit again"
            )
        if "contact slurm controller" in message:
            raise ConfigError(
                f"sbatch: cannot reach the Slurm controller ({message}); submit again when `scontrol ping` says it "
                "is up"
            )
        raise ConfigError(
            f"sbatch: refused {script.name} (exit status {done.returncode}): {message}; "
            "see `sinfo` and `sacctmgr show assoc` for what you may use"
        )
    return parse_job_id(done.stdout)


def show_job(job: str) -> JobFacts | None:
    """What Slurm knows of a job; None when it knows nothing, or there is no Slurm here."""
    return parse_job(_answer("scontrol", "show", "job", "-o", job), job)


def most_cpus(partition: str | None) -> int | None:
    """CPUs of the largest node of a partition, or of all; None where Slurm does not say."""
    selection = [f"--partition={partition}"] if partition else []
    counts = re.findall(
        r"^\s*(\d+)\s*$", _answer("sinfo", "--noheader", "--Node", *selection, "--format=%c"), re.M
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


# options of sbatch ------------------------------------------------------------------------------

_OTHERS = (  # of 22.05 to 24.11; any of them may be given
    "acctg-freq batch bb bbf begin chdir clusters cluster cluster-constraint comment container container-id contiguous "
    "core-spec cores-per-socket cpu-freq cpus-per-gpu deadline delay-boot dependency distribution error exclude "
    "exclusive extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-socket gpus-per-task gres "
    "gres-flags hint hold ignore-pbs input kill-on-invalid-dep licenses mail-type mail-user mcs-label mem-bind "
    "mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist ntasks-per-core ntasks-per-gpu "
    "ntasks-per-socket ntasks-per-tres oom-kill-step overcommit oversubscribe power prefer priority profile propagate "
    "quiet reboot reservation resv-ports segment sockets-per-node spread-job stepmgr switches thread-spec "
    "threads-per-core time-min tmp tres-bind tres-per-task uid use-min-nodes verbose wait-all-nodes wckey"
)
_ONE_TASK = "a node has one task, which starts its processes"
REFUSED_SBATCH_OPTIONS: Mapping[str, str] = {
    "account": "give the key account",
    "array": "it would start one run many times",
    "constraint": "give the key constraint",
    "cpus-per-task": "give the key cpus_per_process",
    "export": "it could hold secrets; export variables in the shell that submits",
    "export-file": "it could hold secrets; export variables in the shell that submits",
    "gpus-per-node": "give --gpus-per-node to `samestep submit`, and the key gpu_type",
    "help": "it queues nothing",
    "job-name": "give --name to `samestep submit`",
    "mem": "give the key memory",
    "nodes": "give --nodes to `samestep submit`",
    "ntasks": _ONE_TASK,
    "ntasks-per-node": _ONE_TASK,
    "tasks-per-node": _ONE_TASK,
    "open-mode": "a requeued job would overwrite its log",
    "output": "the log belongs into the run's folder, where `samestep logs` finds it",
    "parsable": "it is given already",
    "partition": "give the key partition",
    "qos": "give the key qos",
    "requeue": "it is given already",
    "signal": "give the key signal_lead",
    "test-only": "it queues nothing; see --dry-run",
    "time": "give the key time",
    "usage": "it queues nothing",
    "version": "it queues nothing",
    "wait": "it would keep `samestep submit` until the run is done",
    "wrap": "it takes the place of the script",
}
"""Option -> why a site file may not give it: the script says it, or it has no place there."""
_NEVER = ("array", "export", "export-file", "ntasks-per-node", "signal", "test-only", "wait", "wrap")
_VARIABLES = {"array": "SBATCH_ARRAY_INX", "time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE"}


def meant_by(name: str) -> list[str]:
    """The options that getopt_long takes a name for: itself, or all that it is the beginning of; none: unknown here.

    sbatch takes `--arr` for `--array`. Options of a site's own plugins are known to sbatch alone.
    """
    known = {*REFUSED_SBATCH_OPTIONS, *_OTHERS.split()}
    return [name] if name in known else sorted(option for option in known if option.startswith(name))


def why_not(name: str) -> str | None:
    """Why a site file may not give an option, abbreviated or not; None where it may."""
    meant = meant_by(name)
    if len(meant) > 1:
        return f"it may mean {', '.join(f'--{option}' for option in meant)}; write the whole name"
    return REFUSED_SBATCH_OPTIONS.get(meant[0]) if meant else None


def overriding_variables(script: str) -> set[str]:
    """Input variables of sbatch that would win over a line of the script, or do what none of our jobs can be.

    Others are the user's own word on what the script leaves open: SBATCH_ACCOUNT where there is no account in it.
    """
    stated = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    names = {*stated, *_NEVER}
    variables = {_VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}") for name in names}
    return variables | {"SBATCH_NO_REQUEUE"}
