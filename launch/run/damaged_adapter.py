"""A run's `adapter/` that is cut or altered, and how to get it back. Torch-free."""

from __future__ import annotations

from launch.checkpoints.adapter_file import damaged_file
from launch.checkpoints.manifest import MANIFEST
from launch.run.directory import RunDirectory
from launch.untrusted_files import printable


def adapter_damage(run: RunDirectory) -> str | None:
    """Say in a line which file of a run's adapter is damaged and what brings it back; None: none is, or there is no
    adapter.
    """
    if not run.adapter.exists() or (file := damaged_file(run.adapter)) is None:
        return None
    published = [folder.name for folder in run.checkpoints() if (folder / MANIFEST).is_file()]
    repair = (
        f"the run's own `samestep run` command writes it again from {published[-1]}"
        if published
        else "bring it back from a copy (no checkpoint is left to write it from)"
    )
    return f"{printable(str(file))}: is missing, cut or damaged; {repair}"
