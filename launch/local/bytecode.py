"""Where Python keeps the compiled modules of a run's processes, if it cannot keep them beside their sources."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from launch.inputs.caches import cache_root

_FOLDER, _NEVER = "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"


def bytecode_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that let the processes of a run keep compiled modules in the cache folder; often there are none.

    Images of containers come with `PYTHONDONTWRITEBYTECODE`, or with packages in a folder that nobody can write, and
    then each process compiles the 4,000 modules below torch, transformers and trl anew. The folder is the user's
    alone, as what lies in it is executed.
    """
    if environment.get(_FOLDER) or not _compiles_every_time(environment):
        return {}
    folder = cache_root() / f"bytecode-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError:
        return {}
    is_own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    if not is_own or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return {}
    return {_FOLDER: str(folder), _NEVER: ""}


def _compiles_every_time(environment: Mapping[str, str]) -> bool:
    """Whether torch has no compiled modules beside its sources, and will not get any."""
    package = _torch_folder()
    if package is None or any((package / "__pycache__").glob(f"*.{sys.implementation.cache_tag}.pyc")):
        return False
    return bool(environment.get(_NEVER)) or not os.access(package, os.W_OK)


def _torch_folder() -> Path | None:
    specification = find_spec("torch")
    return Path(specification.origin).parent if specification and specification.origin else None
