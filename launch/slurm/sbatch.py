"""The text of a job from a template: a pure function of what was asked for.

Not through `submitit`, which runs a pickled Python function: this script is read, changed and given to `sbatch` by
hand, and starts accelerate's launcher.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.errors import ConfigError
from launch.slurm.attempts import MAX_CRASHES
from launch.slurm.site import Site

_EDIT = re.compile(r"(?:##?SBATCH --(?P<option>[a-z-]+)|(?P<variable>[A-Z_]+))=?.*?# EDIT.*")
_UNQUOTED = re.compile(r"[A-Za-z0-9@%_+=:,./-]+")


@dataclass(frozen=True)
class Job:
    """What a job's script is made of. `environment`: variables that the nodes need beside the site's.

    `max_crashes`: attempts in a row that save no step, after which it is given up.
    """

    name: str
    nodes: int
    gpus_per_node: int
    device: str
    run: Path
    work_folder: Path
    python: str
    site: Site
    mounts: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    max_crashes: int = MAX_CRASHES


# scripts ----------------------------------------------------------------------------------


def train_script(template: str, job: Job) -> str:
    """The text of the training job; a pure function. ConfigError for what an #SBATCH line cannot hold."""
    site = job.site
    options = {**_options(job), "nodes": str(job.nodes), "signal": f"B:USR1@{site.signal_lead}"}
    variables = {
        **_variables(job),
        "TARGET": shlex.quote(str(job.run)),
        "OPTIONS": "()",
        "DEVICE": shlex.quote(job.device),
        "INTERFACE": shlex.quote(site.network_interface or ""),
        "GRACE": str(site.grace_seconds),
        "LEAD": str(site.signal_lead),
        "MAX_CRASHES": str(job.max_crashes),
    }
    return _fill(template, options, variables, site.options)


def follow_up_script(template: str, job: Job, command: Sequence[str]) -> str:
    """The text of a job that runs `samestep COMMAND` on one node."""
    variables = {**_variables(job), "COMMAND": _array(command)}
    return _fill(template, _options(job), variables, job.site.options)


def _options(job: Job) -> dict[str, str | None]:
    """Option of sbatch -> its value; None where the line is left out."""
    site = job.site
    kind = f"{site.gpu_type}:" if site.gpu_type else ""
    # A % would be a pattern in the name of the log alone.
    logs = str(job.run / "logs").replace("%", "%%")
    return {
        "job-name": job.name,
        "gpus-per-node": f"{kind}{job.gpus_per_node}" if job.device == "cuda" else None,
        "cpus-per-task": str(site.cpus_per_process * job.gpus_per_node),
        "mem": site.memory,
        "time": site.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "output": f"{logs}/%j.out",
    }


def _variables(job: Job) -> dict[str, str]:
    """Variable of the template -> its value, as bash writes it."""
    site, container = job.site, job.site.container
    step, image = [], []
    mounts = [*job.mounts, *container.mounts]
    if container.runtime == "pyxis":
        step = [f"--container-image={container.image}"]
        both = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
        step += [f"--container-mounts={','.join(both)}"] if both else []
    elif container.runtime == "apptainer":
        image = ["apptainer", "exec", *(["--nv"] if job.device == "cuda" else [])]
        image += [word for mount in mounts for word in ("--bind", mount)]
        image += [str(container.image)]
    environment = {**job.environment, **site.environment}
    return {
        "PYTHON": shlex.quote(job.python),
        "WORK_FOLDER": shlex.quote(str(job.work_folder)),
        "MODULES": _array(site.modules),
        "ENVIRONMENT": _array([f"{name}={value}" for name, value in sorted(environment.items())]),
        "SCRATCH": shlex.quote(site.scratch or ""),
        "IN_STEP": _array(step),
        "IN_IMAGE": _array(image),
    }


def _array(words: Sequence[str]) -> str:
    quoted = map(shlex.quote, words)
    # A bare comma would do no harm; a reader, and shellcheck, would take it for a slip.
    marked = [f"'{word}'" if "," in word and "'" not in word else word for word in quoted]
    return f"({' '.join(marked)})"


def _fill(
    template: str, options: Mapping[str, str | None], variables: Mapping[str, str], further: Sequence[str]
) -> str:
    """Put values in the place of every line that says EDIT. KeyError for a line without a value."""
    if problems := list(_unwritable(options, further)):
        raise ConfigError(problems)
    lines: list[str] = []
    for line in template.splitlines():
        match = _EDIT.fullmatch(line)
        if not match:
            lines.append(line)
        elif match["variable"]:
            lines.append(f"{match['variable']}={variables[match['variable']]}")
        elif (value := options[match["option"]]) is not None:
            lines.append(f"#SBATCH --{match['option']}={_sbatch_word(value)}")
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    lines[last + 1 : last + 1] = [f"#SBATCH {_further(option)}" for option in further]
    return "\n".join(lines) + "\n"


def _unwritable(options: Mapping[str, str | None], further: Sequence[str]) -> Iterator[str]:
    """sbatch reads its lines with rules of its own (measured with 22.05): a backslash in a log's name switches
    its patterns off, and a line ends where it ends. `$` and backticks mean nothing to it."""
    for name, value in [*options.items(), *((option.partition("=")[0][2:], option) for option in further)]:
        if value is not None and (bad := sorted({*re.findall(r"[\x00-\x1f\x7f\\]", value)})):
            what = "--runs-dir" if name == "output" else f"--{name}"
            shown = ", ".join(map(repr, bad))
            yield f"{what}: {value!r} cannot stand in an #SBATCH line ({shown}); choose another"


def _further(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={_sbatch_word(value)}" if equals else name


def _sbatch_word(value: str) -> str:
    if _UNQUOTED.fullmatch(value):
        return value
    escaped = value.replace('"', '\\"')
    return f'"{escaped}"'
