"""What `accelerate launch` does for one process, without its imports: a command and a few environment variables.

accelerate and torch, which a launcher of several processes needs, are 1 to 3 s before a rank begins with imports of its
own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from launch.untrusted_files import parse_yaml, read_text

CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "NO",
    "mixed_precision": "no",
    "use_cpu": False,
}
"""accelerate_configs/single.yaml. What somebody has changed there, or another file says, is left to accelerate."""
VARIABLES = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
}
"""What `prepare_simple_launcher_cmd_env` of accelerate 1.15 sets for `CONFIG`, without OMP_NUM_THREADS."""
_THREADS = "--num_cpu_threads_per_process"
_OPTIONS = {
    *("--config_file", "--num_machines", "--num_processes", "--machine_rank"),
    *("--main_process_ip", "--main_process_port", _THREADS),
}


def without_accelerate(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    """Return command and environment of the one process that arguments of `accelerate launch` stand for.

    None where there is more to it: several processes, a configuration that is not `CONFIG`, or an option that
    `launch.local.accelerate_command` does not write.
    """
    if "--module" not in arguments:
        return None
    at = arguments.index("--module")
    names, values, module = arguments[:at:2], arguments[1:at:2], arguments[at + 1 :]
    options = dict(zip(names, values, strict=False))
    one = options.get("--num_machines") == options.get("--num_processes") == "1"
    if at % 2 or not one or not module or not _OPTIONS.issuperset(names):
        return None
    try:
        if parse_yaml(read_text(options.get("--config_file", ""))) != CONFIG:
            return None
    except (OSError, ValueError):  # accelerate says what is wrong with it
        return None
    threads = options.get(_THREADS) or environment.get("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", *module]
    return command, {**environment, **VARIABLES, "OMP_NUM_THREADS": threads}
