"""Measures what the time to the first step of an attempt went into; logged once, and kept beside the versions."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from launch.atomic_files import atomic_write
from launch.subprocesses import STARTED
from launch.untrusted_files import read_mapping
from trainer import WATCHDOG

FILE_KEY = "first_step"


class StartupTimer:
    """Measures named parts, one after another. Seconds since 1970: other processes began before this one."""

    def __init__(self, began: float) -> None:
        self._parts: dict[str, float] = {}
        self._last = began

    @staticmethod
    def of_this_process() -> StartupTimer:
        """Start a timer when all is imported. A launcher that `samestep run` started has a part of its own."""
        created = began = psutil.Process().create_time()
        with contextlib.suppress(KeyError, ValueError):
            began = float(os.environ[STARTED])
        timer = StartupTimer(began)
        timer.record("launcher", created)
        timer.record("imports")
        return timer

    def record(self, part: str, now: float | None = None) -> None:
        """Add the time since the part before, up to `now` (default: this moment), to a part."""
        now = time.time() if now is None else now
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now
        WATCHDOG.heartbeat()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part in the order of time, without those of no length; `total` comes first."""
        shown = {part: round(spent, 2) for part, spent in self._parts.items() if spent >= 0.005}
        return {"total": round(sum(self._parts.values()), 2), **shown}

    def summary(self) -> str:
        """Describe the parts for the log."""
        total, *parts = self.seconds().items()
        return f"first step after {total[1]:.1f} s: " + ", ".join(
            f"{part} {spent:.1f}" for part, spent in parts
        )

    def save(self, environment_file: Path, kernels: Mapping[str, str]) -> None:
        """Add the parts to the record of the attempt's machine, unless that file is missing or finds no room.

        `kernels`: those that attend, by the part of the model; they are chosen by the time of the first step.
        """
        with contextlib.suppress(OSError, ValueError):
            environment = read_mapping(environment_file) | {FILE_KEY: self.seconds(), "kernels": {**kernels}}
            atomic_write(environment_file, json.dumps(environment, indent=1) + "\n")
