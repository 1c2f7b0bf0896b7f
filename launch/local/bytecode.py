"""Where Python keeps the compiled modules of a run's processes, if it cannot keep them beside their sources."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_FOLDER, _NEVER = "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"


def keep_own_bytecode() -> None:
    """Let this process keep the modules that it imports from here on, where it could not keep them."""
    if folder := bytecode_variables(os.environ).get(_FOLDER):
        sys.pycache_prefix, sys.dont_write_bytecode = folder, False


def bytecode_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that let the processes of a run keep compiled modules in the cache folder; often there are none.

    Images of containers come with `PYTHONDONTWRITEBYTECODE`, or with packages in a folder that nobody can write, and
    then each process compiles the 4,000 modules below torch, transformers and trl anew. Each set of packages has a
    folder of its own: Python knows a source by its path, time and size, which two images may have in common.
    """
    if environment.get(_FOLDER) or not _compiles_every_time(environment):
        return {}
    from launch.inputs.caches import private_cache  # imports what few machines need here, before each command

    folder = private_cache(f"bytecode-{_packages_digest()}")
    if folder is None:
        return {}
    return {_FOLDER: str(folder), _NEVER: ""}


def _compiles_every_time(environment: Mapping[str, str]) -> bool:
    """Whether torch has no compiled modules beside its sources, and will not get any."""
    package = _torch_folder()
    if package is None or any((package / "__pycache__").glob(f"*.{sys.implementation.cache_tag}.pyc")):
        return False
    return bool(environment.get(_NEVER)) or not os.access(package, os.W_OK)


@cache
def _packages_digest() -> str:
    """Of the names of all installed packages' records, which have their versions: none of them is opened."""
    from hashlib import sha256

    records = {record.name for folder in sys.path for record in Path(folder).glob("*.dist-info")}
    return sha256("\n".join([sys.version, sys.prefix, *sorted(records)]).encode()).hexdigest()[:12]


def _torch_folder() -> Path | None:
    specification = find_spec("torch")
    return Path(specification.origin).parent if specification and specification.origin else None
