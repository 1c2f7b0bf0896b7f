"""The run directory: the only state of a run, and who may write to it.

runs/<name>/ holds recipe.yaml, plan.json, environment.json, checkpoint-<step>/, adapter/, merged/,
metrics.jsonl, evaluations.jsonl, eval.json, at most one marker (DONE, STOPPED or REFUSED) and the lock of the
process that writes.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from launch.errors import ConfigError

MarkerKind = Literal["DONE", "STOPPED", "REFUSED"]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LOCK_PATIENCE_S = 1.0  # longer than a look at the lock by `lock_holder` can last

_held_locks: set[int] = set()


@dataclass(frozen=True)
class RunDirectory:
    """Names of everything in one run's folder. Creates nothing."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    def eval_file(self, split: str = "test", samples: int | None = None) -> Path:
        """Figures and answers of the last evaluation of a split, or of so many samples of it.

        `eval.json` is that of the whole test split: a look at a few samples does not replace it.
        """
        parts = ["eval", *([] if split == "test" else [split]), *([] if samples is None else [str(samples)])]
        return self.path / f"{'-'.join(parts)}.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """Every folder called checkpoint-<step>, published or not, oldest step first."""
        if not self.path.is_dir():
            return []
        found = [
            (int(match[1]), entry)
            for entry in self.path.iterdir()
            if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return [entry for _, entry in sorted(found) if entry.is_dir()]


@dataclass(frozen=True)
class Marker:
    """How the last attempt ended, and its last words."""

    kind: MarkerKind
    text: str


def open_run(runs_dir: str | Path, name: str) -> RunDirectory:
    """The run called `name` below `runs_dir`. Refuses (ConfigError) a name that could leave that folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"--name: {name!r} is not a run name; use 1 to 100 letters, digits, '.', '_' or '-', "
            "the first a letter or digit (no folders: choose those with --runs-dir)"
        )
    return RunDirectory(Path(runs_dir).expanduser().absolute() / name)


def write_marker(run: RunDirectory, kind: MarkerKind, text: str = "") -> None:
    """Say how this attempt ended, in one rename; replaces every earlier marker."""
    aside = run.path / f".{kind}.{os.getpid()}"
    aside.write_text(text, encoding="utf-8")
    aside.replace(run.path / kind)
    for other in get_args(MarkerKind):
        if other != kind:
            (run.path / other).unlink(missing_ok=True)


def read_marker(run: RunDirectory) -> Marker | None:
    """The marker of the last attempt; None while it runs or when it died without a word."""
    for kind in get_args(MarkerKind):
        try:
            return Marker(kind, (run.path / kind).read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            continue
    return None


def clear_markers(run: RunDirectory) -> None:
    """Forget how earlier attempts ended."""
    for kind in get_args(MarkerKind):
        (run.path / kind).unlink(missing_ok=True)


@contextmanager
def hold_lock(folder: Path, file_name: str = ".lock") -> Iterator[None]:
    """Hold the one lock of `folder` (rank 0 of the trainer, for its lifetime). ConfigError: who holds it.

    The kernel lets go when the process dies, however it dies. The file stays: removing it would let two
    processes lock two different files of one name.
    """
    path = folder / file_name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held_locks.add(descriptor)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    raise ConfigError(_in_use(path, holder)) from None
                time.sleep(0.05)
            except OSError as error:
                raise ConfigError(
                    f"{path}: cannot be locked ({error.strerror}); the file system knows no locks, "
                    "choose a --runs-dir on another one (on Lustre: mounted with -o flock)"
                ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _held_locks.discard(descriptor)
        os.close(descriptor)


def lock_holder(folder: Path, file_name: str = ".lock") -> str | None:
    """Who holds the lock of `folder` now ("process 12 on host"); None when nobody does."""
    try:
        descriptor = os.open(folder / file_name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    finally:
        os.close(descriptor)


def refuse_if_running(run: RunDirectory) -> None:
    """ConfigError while a trainer holds this run's lock."""
    if holder := lock_holder(run.path):
        raise ConfigError(_in_use(run.path, holder))


def _in_use(path: Path, holder: str) -> str:
    who = holder or "another process"
    return f"{path}: this run is under way ({who}); wait for it to end or choose another --name"


def _let_go_after_fork() -> None:
    """A forked data worker must not keep the lock of a trainer that was killed."""
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_let_go_after_fork)
