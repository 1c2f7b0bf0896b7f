"""The environment variables by which a launcher talks to its processes: ours, accelerate's and torchrun's.

Those of another job, left in a shell or passed on by a job's own launcher, would make a process dial that job's address
or train another strategy. The launcher of a run sets all that it needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from launch.errors import ConfigError

PARENT = "SAMESTEP_PARENT"
"""In the environment of a child: the process id of whoever waits for it. The child ends when that one is gone."""


MARKER_DECIDES = "--marker-decides"
"""On the command line of a trainer that somebody waits for, who reads the marker."""

_ADDRESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_NAMES = frozenset(
    (
        *_ADDRESS,
        *("LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
        # accelerate 1.15 reads these for the number of processes, too
        *("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        *("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    )
)
_OF_A_RANK = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
"""In the environment of a rank that torchrun started; that accelerate started as the only one."""
_PREFIXES = re.compile(r"(TORCHELASTIC|PET|ACCELERATE|FSDP|PARALLELISM_CONFIG)_")


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, as one of its ranks."""
    return any(name in environment for name in _OF_A_RANK)


def launcher_variables(environment: Mapping[str, str]) -> list[str]:
    """Names in an environment that only a launcher should set for its own processes, sorted."""
    return sorted(name for name in environment if name in _NAMES or _PREFIXES.match(name))


def remove_launcher_variables(environment: MutableMapping[str, str]) -> str | None:
    """Take another job's variables out of an environment; what to say about it, None where there were none."""
    inherited = launcher_variables(environment)
    for name in inherited:
        del environment[name]
    if not inherited:
        return None
    return f"environment: not passed on: {', '.join(inherited)} (of another job's launcher; this one sets its own)"


def refuse_odd_launch(environment: Mapping[str, str]) -> None:
    """Judge what a process was told about its place among others, before it dials anybody.

    Raises:
        ConfigError: a number is none, the address is not whole, or the launcher itself was started with all of it.
    """
    address = {name: environment[name] for name in _ADDRESS if name in environment}
    problems = [
        f"{name}: {environment[name]!r} is no number of a process or port; unset it, or start with accelerate launch"
        for name in _NUMBERS
        if name in environment and not environment[name].isdecimal()
    ]
    if "RANK" in address or "WORLD_SIZE" in address or "LOCAL_RANK" in address:
        missing = [name for name in _ADDRESS if name not in address]
        if missing:
            problems.append(
                f"environment: {', '.join(address)} without {', '.join(missing)}; unset what is left of another job, "
                "or start with accelerate launch, which sets all of them"
            )
        elif not problems and int(address["RANK"]) >= int(address["WORLD_SIZE"]):
            problems.append(
                f"RANK: {address['RANK']} of WORLD_SIZE {address['WORLD_SIZE']} processes; unset what is left of "
                "another job"
            )
        elif not problems and _is_inherited(address):
            problems.append(
                f"environment: {', '.join(address)} were there before the launcher began (another job's: "
                f"{address['MASTER_ADDR']}:{address['MASTER_PORT']}); unset them"
            )
    if problems:
        raise ConfigError(problems)


def _is_inherited(address: Mapping[str, str]) -> bool:
    """The parent is a Python program, as launchers are, and was itself started with all of these variables.

    A launcher sets them for its children alone, so they are another job's. Of a process whose parent cannot be looked
    into (another user's, `srun`) nothing is known.
    """
    try:
        parent = Path("/proc") / str(os.getppid())
        if not (parent / "exe").samefile("/proc/self/exe"):
            return False
        parent_variables = (parent / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return all(f"{name}={value}".encode() in parent_variables for name, value in address.items())
