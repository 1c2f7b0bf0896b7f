"""The checkpoints of a run, as found: which are valid, and what is wrong with the others."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checkpoints.manifest import CHECKPOINT_NAME, MANIFEST, entries, file_differences, load_manifest
from launch.errors import CheckpointError
from launch.untrusted_files import reason_of


@dataclass(frozen=True)
class Checkpoint:
    """One folder of a run, as found. `metadata`: the manifest's `facts` ({} when not known); `bytes`: on the disk."""

    folder: Path
    step: int
    published: bool
    metadata: dict[str, Any]
    bytes: int
    problems: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """A run can go on from it."""
        return self.published and not self.problems


def scan_checkpoints(
    run_dir: Path, verify: bool = True, telling: Callable[[Path], None] = lambda _: None
) -> list[Checkpoint]:
    """List every checkpoint of a run, published or not, oldest step first.

    With `verify` the whole content is read; `telling` hears of each folder before. Raises CheckpointError
    when the run's folder itself cannot be read: nothing found there would mean that nothing is there.
    """
    checkpoints = []
    for step, published, folder in folders_of(run_dir):
        telling(folder)
        checkpoints.append(inspect_checkpoint(folder, step, published, verify))
    # A run under way may have published, or rotated away, what it had a moment ago.
    return [checkpoint for checkpoint in checkpoints if os.path.lexists(checkpoint.folder)]


def newest_valid(run_dir: Path) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The checkpoint of the highest step whose whole content verifies, and what is newer but cannot be used.

    The latter newest first. Reads content from the newest down to the first valid one and no further.
    Raises CheckpointError when the run's folder itself cannot be read.
    """
    passed_over: list[Checkpoint] = []
    for step, published, folder in reversed(folders_of(run_dir)):
        checkpoint = inspect_checkpoint(folder, step, published, verify=True)
        if checkpoint.valid:
            return checkpoint, passed_over
        passed_over.append(checkpoint)
    return None, passed_over


def folders_of(run_dir: Path) -> list[tuple[int, bool, Path]]:
    """(step, published, path) of everything named like a checkpoint, by step; unpublished before published."""
    return sorted((int(match[1]), not match[2], path) for path, match in named_like(run_dir, CHECKPOINT_NAME))


def named_like(run_dir: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    try:
        return [(path, match) for path in run_dir.iterdir() if (match := pattern.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{run_dir}: cannot be read ({reason_of(error)}); give permission, or choose another run"
        ) from None


def inspect_checkpoint(folder: Path, step: int, published: bool, verify: bool) -> Checkpoint:
    """What is to be known of one folder. Raises nothing: whatever is wrong becomes a problem."""
    size = sum(status.st_size for status in entries(folder)[0].values())
    if not published:
        never = (
            f"{folder}: was never published (killed while it was written, or being written now); "
            "a run that resumes removes it"
        )
        return Checkpoint(folder, step, published, {}, size, (never,))
    try:
        manifest = load_manifest(folder / MANIFEST)
    except CheckpointError as error:
        return Checkpoint(folder, step, published, {}, size, tuple(str(error).splitlines()))
    problems = tuple(file_differences(folder, manifest["files"], verify))
    return Checkpoint(folder, step, published, manifest["facts"], size, problems)
