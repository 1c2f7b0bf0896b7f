"""The run directory: the only state of a run, and who may write to it.

runs/<name>/ holds recipe.yaml, plan.json, data_report.jsonl, environment.json, checkpoint-<step>/, adapter/, merged/,
adapter-best/, metrics.jsonl, evaluations.jsonl, answers/, eval.json, at most one marker (DONE, STOPPED or REFUSED) and
the lock of the process that writes. Whoever wants something of a run under way puts a file there: STOP, with its
reason, or SAVE.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from launch.atomic_files import atomic_write
from launch.checkpoints.adapter_file import is_whole
from launch.errors import ConfigError, InUseError, SamestepError, UnansweredError
from launch.option_values import NAME_PATTERN
from launch.untrusted_files import (
    UNREADABLE,
    UntrustedFileError,
    open_plain,
    read_text,
)

MarkerKind = Literal["DONE", "STOPPED", "REFUSED"]
StopReason = Literal["user", "preempted", "time", "terminated", "orphaned"]
"""Who wants the run to stop: somebody, the scheduler, the end of the allocation, a SIGTERM outside a job of a
scheduler (`kill`, a machine that shuts down); or its launcher is gone."""

COPY_PREFIX = ".replay-"
"""How the folder begins that holds a copy of a run whose steps are taken again (`launch.audit.restored`)."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunDirectory:
    """Names of everything in one run's folder. Creates nothing."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the run: that of its folder."""
        return self.path.name

    @property
    def is_copy(self) -> bool:
        """Whether this is a copy whose steps are taken again: nobody goes on with it."""
        return self.path.parent.name.startswith(f"{COPY_PREFIX}{self.name}-")

    @property
    def recipe_file(self) -> Path:
        """The recipe as it was resolved, overrides included."""
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        """The plan of the newest attempt."""
        return self.path / "plan.json"

    @property
    def environment_file(self) -> Path:
        """The machine and its versions."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """One line for each optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        """One line for each evaluation during training."""
        return self.path / "evaluations.jsonl"

    @property
    def stop_file(self) -> Path:
        """Asks for a stop at the next step boundary; its first word is the reason (empty: `user`)."""
        return self.path / "STOP"

    @property
    def save_file(self) -> Path:
        """Asks for a checkpoint at the next step boundary."""
        return self.path / "SAVE"

    @property
    def adapter(self) -> Path:
        """The result, in PEFT's format."""
        return self.path / "adapter"

    @property
    def best_adapter(self) -> Path:
        """The adapter of the best evaluation, with `checkpoint.keep_best`."""
        return self.path / "adapter-best"

    @property
    def answers(self) -> Path:
        """What every model answered, by weights, prompt, split and decoding."""
        return self.path / "answers"

    @property
    def merged(self) -> Path:
        """The model merged onto the original base."""
        return self.path / "merged"

    @property
    def merged_dequantized(self) -> Path:
        """The model merged onto the base rounded to 4 bits and back."""
        return self.path / "merged-dequantized"

    def eval_file(
        self,
        split: str = "test",
        samples: int | None = None,
        checkpoint: int | None = None,
        label: str = "",
    ) -> Path:
        """Figures and answers of every model that was evaluated on a split, or on so many samples of it.

        `eval.json` is that of the whole test split and the run's adapter: a look at a few samples, at the checkpoint
        after `checkpoint` steps, or at what another folder holds, called `label`, does not replace it.
        """
        parts = ["eval", *([label] if label else [])]
        parts += [] if checkpoint is None else [f"checkpoint-{checkpoint}"]
        parts += [*([] if split == "test" else [split]), *([] if samples is None else [str(samples)])]
        return self.path / f"{'-'.join(parts)}.json"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Path]:
        """List every folder called checkpoint-<step>, published or not, oldest step first."""
        if not self.path.is_dir():
            return []
        numbered = [
            (int(match[1]), entry)
            for entry in self.path.iterdir()
            if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return [entry for _, entry in sorted(numbered) if entry.is_dir()]

    def has_work(self) -> bool:
        """Something in it took steps to make: it is not to go when a request is refused late."""
        return bool(self.checkpoints()) or self.adapter.exists() or self.metrics_file.exists()


@dataclass(frozen=True)
class Marker:
    """How the last attempt ended, and its last words."""

    kind: MarkerKind
    text: str


def open_run(runs_dir: str | Path, name: str) -> RunDirectory:
    """Name the run called `name` below `runs_dir`. Refuses (ConfigError) a name that could leave that folder."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"--name: {name!r} is not a run name; use 1 to 100 letters, digits, '.', '_' or '-', "
            "the first a letter or digit (no folders: choose those with --runs-dir)"
        )
    return RunDirectory(Path(runs_dir).expanduser().absolute() / name)


def write_marker(run: RunDirectory, kind: MarkerKind, text: str = "") -> None:
    """Say how this attempt ended, in one rename; replaces every earlier marker."""
    atomic_write(run.path / kind, text)
    for other in get_args(MarkerKind):
        if other != kind:
            (run.path / other).unlink(missing_ok=True)


def leave_stopped(run: RunDirectory, reason: str, where: str = "before it began") -> None:
    """STOPPED for an attempt that is given up before its first step; a disk that takes no word gets none."""
    with contextlib.suppress(OSError):
        write_stopped(run, reason, where)


def write_stopped(run: RunDirectory, reason: str, where: str) -> None:
    """Say that this attempt stopped as it was asked to; the request is answered.

    The user may have asked meanwhile (a last checkpoint takes its time), of whom a job that was only preempted, and is
    queued again, would know nothing.
    """
    write_marker(run, "STOPPED", f"{reason}: {where}")
    if clear_requests(run) == "user" and reason != "user":
        write_marker(run, "STOPPED", f"user: {where}")


def read_marker(run: RunDirectory) -> Marker | None:
    """Read the marker of the last attempt; None while it runs or when it died without a word.

    Raises:
        UntrustedFileError: what lies there is no marker of ours, such as a folder.
        OSError: it is not for us to read.
    """
    for kind in get_args(MarkerKind):
        try:
            return Marker(kind, read_text(run.path / kind).strip())
        except FileNotFoundError:
            continue
    return None


def is_done_at(run: RunDirectory, max_steps: int, early_end: int | None = None) -> bool:
    """The run has taken its last step of `max_steps`, and its adapter is whole. A damaged marker says nothing.

    `early_end`: the step at which it ends all the same (`launch.run.evaluations`).
    """
    try:
        marker = read_marker(run)
    except UntrustedFileError:
        return False
    ends = [Marker("DONE", f"step {step}") for step in (max_steps, early_end) if step is not None]
    return marker in ends and is_whole(run.adapter)


def clear_markers(run: RunDirectory) -> None:
    """Forget how earlier attempts ended."""
    for kind in get_args(MarkerKind):
        (run.path / kind).unlink(missing_ok=True)


def reason_of_sigterm() -> StopReason:
    """Say who sent SIGTERM: in a job of Slurm the scheduler (the second variable is of our script); else somebody."""
    return "preempted" if {"SLURM_JOB_ID", "SAMESTEP_STOP_LEAD"} & os.environ.keys() else "terminated"


def request_stop(run: RunDirectory, reason: StopReason) -> None:
    """Ask the run for one agreed stop at the next step boundary; an earlier request stays, with its reason.

    Raises:
        OSError: there is no writing to the run's folder, or a folder lies where the request belongs.
    """
    if requested_stop(run):
        return
    # A second signal may come while the first one's is being written.
    atomic_write(run.stop_file, f"{reason}\n")


def requested_stop(run: RunDirectory) -> StopReason | None:
    """The reason in the STOP file, `user` for one without a known word or not for us to read; None without the file.

    What is no plain file is no request: a folder could not be cleared away, a pipe would be waited for.
    """
    return _stop_in(run.stop_file)


def _stop_in(file: Path) -> StopReason | None:
    try:
        if not file.is_file():
            return None
        with open_plain(file) as opened:
            words = opened.read(100).decode(errors="replace").split()
    except PermissionError:
        return "user"
    except UNREADABLE:  # just taken away, or a shared disk that is out of reach: the next step looks again
        return None
    known = {reason: reason for reason in get_args(StopReason)}
    return known.get(words[0].lower().rstrip(":"), "user") if words else "user"


def requested_save(run: RunDirectory) -> bool:
    """A plain file SAVE is there, as far as the disk says."""
    try:
        return run.save_file.is_file()
    except OSError:
        return False


def clear_requests(run: RunDirectory) -> StopReason | None:
    """Forget what was asked of an attempt that is over. Returns the reason of the stop that went.

    It is moved aside before it is read: one that somebody asks for between a look and a removal would go unseen.
    """
    with contextlib.suppress(OSError):  # not there, or a folder, which asks for nothing
        run.save_file.unlink()
    aside, reason = run.path / f".STOP.cleared.{os.getpid()}", None
    with contextlib.suppress(OSError):
        if run.stop_file.is_symlink() or not run.stop_file.is_dir():
            run.stop_file.replace(aside)
            reason = _stop_in(aside)
            aside.unlink()
    return reason


def make_folder(run: RunDirectory) -> bool:
    """Make the run's folder, and those above it; False when it was there before."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    try:
        run.path.mkdir()
    except FileExistsError:
        return False
    return True


@contextmanager
def removed_on_failure(run: RunDirectory, new: bool) -> Iterator[None]:
    """A run's folder that is `new`, made by the caller, goes again when the block is refused or finds no room.

    Not when somebody else has taken it meanwhile, or may have; nor at a Ctrl-C: the same command goes on.
    """
    try:
        yield
    except (InUseError, UnansweredError):
        raise
    except (SamestepError, OSError):
        if new and not run.has_work():
            shutil.rmtree(run.path, ignore_errors=True)
        raise
