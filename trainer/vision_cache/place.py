"""Where the features of a vision cache lie, and how many bytes they may take there."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Literal

import psutil

from launch.errors import ConfigError
from launch.hardware import SHARED_MEMORY
from launch.inputs.caches import cache_root

Place = Literal["memory", "disk"]
DISK_BYTES = 100 * 10**9
"""By default. All of ChartQA's charts take 93 GB from a 7B model."""


def root_of(place: Place) -> Path:
    """The folder of all features in a place."""
    if configured := os.environ.get("SAMESTEP_VISION_CACHE"):
        return Path(configured).expanduser().resolve() / place
    if place == "disk":
        return cache_root() / "vision"
    return SHARED_MEMORY / f"samestep-{os.getuid()}"


def bound_of(place: Place, root: Path) -> int:
    """The most bytes that features may take in a place.

    In memory by default half of what its file system could hold, and of what the machine has free: the data workers
    hand micro-batches over in /dev/shm too.

    Raises:
        ConfigError: SAMESTEP_VISION_CACHE_GB is no number above 0.
    """
    if configured := os.environ.get("SAMESTEP_VISION_CACHE_GB"):
        try:
            size = float(configured)
        except ValueError:
            size = 0.0
        if not 0 < size < float("inf"):
            raise ConfigError(
                f"SAMESTEP_VISION_CACHE_GB: {configured!r} is no number of gigabytes above 0; give for example 200"
            )
        return int(size * 10**9)
    if place == "disk":
        return DISK_BYTES
    return min(shutil.disk_usage(root).total, _memory_bytes()) // 2


def _memory_bytes() -> int:
    """What is free in the machine's memory, or in the control group's where that is less."""
    free = int(psutil.virtual_memory().available)
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int((Path("/sys/fs/cgroup") / file).read_text()))
    return free


def feature_folders(root: Path) -> list[Path]:
    """The folders of all towers and settings in a root, by name; none where it cannot be read."""
    try:
        return sorted(path for path in root.iterdir() if len(path.name) == 32 and path.is_dir())
    except OSError:
        return []
