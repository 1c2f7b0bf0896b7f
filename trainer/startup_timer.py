"""The time to the first step of an attempt, by what it went into: said once, and kept beside the versions."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

import psutil

from launch.atomic_files import atomic_write
from launch.subprocesses import STARTED
from launch.untrusted_files import read_mapping
from trainer import WATCHDOG

FILE_KEY = "first_step"


class FirstStep:
    """A clock that is told what has passed. Seconds since 1970: other processes began before this one."""

    def __init__(self, began: float) -> None:
        self._parts: dict[str, float] = {}
        self._last = began

    @staticmethod
    def of_this_process() -> FirstStep:
        """To be asked for when all is imported. A launcher that `samestep run` started has a part of its own."""
        created = began = psutil.Process().create_time()
        with contextlib.suppress(KeyError, ValueError):
            began = float(os.environ[STARTED])
        clock = FirstStep(began)
        clock.passed("launcher", created)
        clock.passed("imports")
        return clock

    def passed(self, part: str, now: float | None = None) -> None:
        """Up to now, or `now`, since the part before."""
        now = time.time() if now is None else now
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now
        WATCHDOG.heartbeat()

    def seconds(self) -> dict[str, float]:
        """Of each part in the order of time, those of no length left out; `total` of all."""
        shown = {part: round(spent, 2) for part, spent in self._parts.items() if spent >= 0.005}
        return {"total": round(sum(self._parts.values()), 2), **shown}

    def words(self) -> str:
        """For the log."""
        total, *parts = self.seconds().items()
        return f"first step after {total[1]:.1f} s: " + ", ".join(
            f"{part} {spent:.1f}" for part, spent in parts
        )

    def keep(self, environment_file: Path) -> None:
        """In the record of the attempt's machine; a file that is not there or finds no room stays as it is."""
        with contextlib.suppress(OSError, ValueError):
            facts = read_mapping(environment_file) | {FILE_KEY: self.seconds()}
            atomic_write(environment_file, json.dumps(facts, indent=1) + "\n")
