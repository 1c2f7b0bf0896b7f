"""The long options of sbatch: which a site file may not give, and which variables say the same."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
REFUSED: Mapping[str, str] = {
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
    known = {*REFUSED, *_OTHERS.split()}
    return [name] if name in known else sorted(option for option in known if option.startswith(name))


def why_not(name: str) -> str | None:
    """Why a site file may not give an option, abbreviated or not; None where it may."""
    meant = meant_by(name)
    if len(meant) > 1:
        return f"it may mean {', '.join(f'--{option}' for option in meant)}; write the whole name"
    return REFUSED.get(meant[0]) if meant else None


def overriding_variables(script: str) -> set[str]:
    """Input variables of sbatch that would win over a line of the script, or do what none of our jobs can be.

    Others are the user's own word on what the script leaves open: SBATCH_ACCOUNT where there is no account in it.
    """
    stated = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    names = {*stated, *_NEVER}
    variables = {_VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}") for name in names}
    return variables | {"SBATCH_NO_REQUEUE"}
