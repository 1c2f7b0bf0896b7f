"""The site file: what differs between clusters, so that a recipe and a command line fit all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from launch.errors import ConfigError
from launch.recipe.schema import Section
from launch.recipe.validation_errors import validation_errors
from launch.slurm.commands import why_not
from launch.untrusted_files import UntrustedFileError, read_yaml, reason_of

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INSTEAD = "would write a secret into every job's script; remove it, and export it in the shell that submits"


class ContainerSection(Section):
    """How a job's processes get into an image."""

    runtime: Literal["none", "apptainer", "pyxis"] = Field("none", description="none, apptainer or pyxis")
    image: str | None = Field(None, min_length=1, description="an image as the runtime names it")
    mounts: list[str] = Field([], description="folders of the nodes, each as HERE or HERE:THERE")
    python: str = Field("python", min_length=1, description="the image's Python with samestep installed")


class Site(Section):
    """One cluster. Every value can be left out; options of `samestep submit` win."""

    partition: str | None = Field(None, min_length=1, description="a partition that `sinfo` lists")
    account: str | None = Field(None, min_length=1, description="the account that pays")
    qos: str | None = Field(None, min_length=1, description="a quality of service")
    constraint: str | None = Field(None, min_length=1, description="node features, as of sbatch --constraint")
    time: str | None = Field(
        None,
        pattern=r"^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$|^(UNLIMITED|INFINITE)$",
        description='a time limit as of sbatch, in quotes in a file: "12:00:00", "1-00:00:00"',
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="what the nodes train on: cuda or cpu")
    gpu_type: str | None = Field(
        None, min_length=1, description="a type of GPU, as of sbatch --gpus-per-node"
    )
    gpu_memory: str | None = Field(
        None,
        pattern=r"^\s*[0-9]+(\.[0-9]+)?\s*([Gg]([Ii]?[Bb])?)?\s*$",
        description="the memory of one GPU, for example 80GB",
    )
    cpus_per_process: int = Field(8, ge=1, description="CPUs for each process, at least 1")
    memory: str | None = Field(
        None, min_length=1, description="memory of a node as of sbatch --mem: 0 is all"
    )
    options: list[str] = Field([], description="further options of sbatch, each as --name or --name=value")
    modules: list[str] = Field([], description="names for `module load`")
    environment: dict[str, str] = Field({}, description="variables and their values, both texts")
    container: ContainerSection = ContainerSection()
    python: str | None = Field(
        None, min_length=1, description="a Python with samestep, by default that of the command"
    )
    network_interface: str | None = Field(
        None, min_length=1, description="the interface between the nodes: ib0"
    )
    scratch: str | None = Field(None, min_length=1, description="a folder on each node's own disk")
    grace_seconds: int = Field(30, ge=1, description="seconds from TERM to KILL (KillWait, GraceTime)")
    signal_lead: int = Field(
        120, ge=1, le=65535, description="seconds of warning before the time limit, 1 to 65535"
    )

    @model_validator(mode="after")
    def _values_can_be_written(self) -> Site:
        if problems := list(_problems(self)):
            raise ValueError("\n".join(problems))
        return self


def _problems(site: Site) -> Iterator[str]:
    for key, value in site.environment.items():
        if not _NAME.fullmatch(key):
            yield f"environment.{key!r}: not a variable's name; use letters, digits and _"
        elif is_secret(key, value):
            yield f"environment.{key}: {_INSTEAD}"
    for option in site.options:
        yield from _problems_of_option(option)
    written = site.model_dump(exclude={"environment", "options", "container"})
    written |= {f"container.{key}": value for key, value in site.container.model_dump().items()}
    for key, values in written.items():
        if any(is_secret("", str(value)) for value in (values if isinstance(values, list) else [values])):
            yield f"{key}: {_INSTEAD}"
    if site.container.runtime == "none" and site.container.image:
        yield "container.runtime: none although there is an image; give apptainer or pyxis"
    if site.container.runtime != "none" and not site.container.image:
        yield "container.image: missing; name the image, here or with --container"


def _problems_of_option(option: str) -> Iterator[str]:
    name, _, value = option.partition("=")
    assigned = re.findall(r"(\w+)=([^,\s]*)", value)
    if not re.fullmatch(r"--[a-z][a-z-]*(=.+)?", option, re.DOTALL):
        yield f"options: {option!r} is no option of sbatch; write --name or --name=value"
    elif is_secret(name, value) or any(is_secret(*pair) for pair in assigned):
        yield f"options: {name} {_INSTEAD}"
    elif reason := why_not(name[2:]):
        yield f"options: {name} is not for a site file: {reason}"


def load_site(file: Path | None, changes: dict[str, object]) -> Site:
    """Read a site file (none: the defaults) and put what the command line says in its place.

    `changes`: key -> value, `container.image` for the image; None leaves what the file says.
    Raises ConfigError with every problem.
    """
    values = _read(file) if file else {}
    for key, value in changes.items():
        if value is None:
            continue
        section, _, inner = key.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):
            target[inner or key] = value
    try:
        return Site.model_validate(values)
    except ValidationError as error:
        place = f"{file}: " if file else ""
        raise ConfigError(
            [f"{place}{line}" for line in validation_errors(error, Site, {}, "a site file")]
        ) from None


def _read(file: Path) -> dict[str, object]:
    try:
        values = read_yaml(file.expanduser())
    except UntrustedFileError as error:
        raise ConfigError(f"--site: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        raise ConfigError(
            f"--site: {file} cannot be read ({reason_of(error)}); see slurm/site.example.yaml"
        ) from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"--site: {file} is not a mapping of keys; see slurm/site.example.yaml")
    return values or {}


# what looks like a secret: scripts and logs are read by others ----------------------------------

_WORDS = {
    *("token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "pass", "pat", "credential"),
    *("credentials", "creds", "auth", "key", "apikey", "cookie", "bearer"),
}
_ENDS = ("token", "secret", "secrets", "password", "passwd", "passphrase", "apikey", "credentials")
_PLACES = {"file", "path", "dir", "folder", "sock", "url", "uri"}
_SWITCHES = {"", "0", "1", "true", "false", "yes", "no", "on", "off"}
_ALONE = re.compile(r"hf_\w+|sk-\S{6,}|gh[pousr]_[A-Za-z0-9]{3,}")
"""The whole value of a variable or an option: Hugging Face, OpenAI and others, GitHub. Places and groups may be called
so: a partition hf_gpu, a folder /data/ghs_lab."""
_VALUE = re.compile(
    r"""
      (?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{30,} | sk-(?:ant-|proj-|[A-Za-z0-9]{20,})        # the same among other words, by their length
      | gh[pousr]_[A-Za-z0-9]{30,}
      | github_pat_\w{3,} | glpat-[\w-]{6,}                             # GitHub, GitLab
      | xox[abeprs]-[\w-]{6,} | A[KS]IA[0-9A-Z]{12,} | AIza[\w-]{30,}   # Slack, Amazon, Google
      | eyJ[\w-]{4,}\.eyJ[\w-]{4,} )                                    # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | ://[^/@\s]*:[^/@\s]+@(?!sha256:)                                  # a password in an address; not IMAGE:TAG@DIGEST
    """,
    re.VERBOSE,
)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or an option of this name (empty: none) has a value that nobody else should read.

    By its name: API_KEY, MYTOKEN, DB_PWD; HF_TOKEN_PATH names a place, TOKENIZERS_PARALLELISM and MAX_TOKENS no token,
    and a switch is none. Or by the value: a token of a known service, a private key, an address with a password.
    """
    by_name = _names_a_secret(name) and value.lower() not in _SWITCHES
    alone = name != "" and _ALONE.fullmatch(value) is not None
    return by_name or alone or _VALUE.search(value) is not None


def _names_a_secret(name: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    if not words or words == ["pwd"] or words[-1] in _PLACES:
        return False
    return any(word in _WORDS or word.endswith(_ENDS) for word in words)
