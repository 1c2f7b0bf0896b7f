"""What `samestep checkpoints` shows: a row for each checkpoint, and why a run cannot go on from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.checkpoints.manifest import MANIFEST, OLDER
from launch.checkpoints.scan import Checkpoint
from launch.planning.plan import Plan, samples_consumed
from launch.units import age, megabytes
from launch.untrusted_files import printable

CHECKPOINT_COLUMNS = ("step", "form", "world size", "strategy", "MB", "age", "state")
_UNKNOWN = "?"


def table_rows(checkpoints: Sequence[Checkpoint], now: float) -> list[tuple[str, ...]]:
    """A row of `CHECKPOINT_COLUMNS` for each checkpoint. `now`: seconds since 1970, as the ages are counted from."""
    return [
        (
            str(checkpoint.step),
            _fact(checkpoint, "form", "portable"),
            _fact(checkpoint, "world_size", _UNKNOWN),
            _fact(checkpoint, "strategy", _UNKNOWN),
            megabytes(checkpoint.bytes),
            _age_of(checkpoint, now),
            _state(checkpoint),
        )
        for checkpoint in checkpoints
    ]


def as_objects(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """What `samestep checkpoints --json` prints: for each checkpoint its step, state, size in bytes and problems."""
    return [
        {
            "step": checkpoint.step,
            "folder": str(checkpoint.folder),
            "form": _fact(checkpoint, "form", "portable"),
            "world_size": checkpoint.metadata.get("world_size"),
            "strategy": checkpoint.metadata.get("strategy"),
            "bytes": checkpoint.bytes,
            "state": _state(checkpoint),
            "problems": list(checkpoint.problems),
        }
        for checkpoint in checkpoints
    ]


def reasons(checkpoints: Sequence[Checkpoint], plan: Plan | None = None) -> list[str]:
    """The lines below the table: where resuming would go on by the run's plan, then every reason why not elsewhere."""
    valid = [checkpoint for checkpoint in checkpoints if checkpoint.valid]
    problems = [line for checkpoint in checkpoints for line in checkpoint.problems]
    if valid:
        where = _does_not_fit(valid[-1], plan) or f"go on from step {valid[-1].step}"
    elif all_damaged(checkpoints):
        where = (
            "be refused: every published checkpoint is damaged; bring one back from a copy, or begin anew with "
            "`samestep run --fresh`"
        )
        problems = [line.replace(OLDER, "bring back a copy") for line in problems]
    else:
        where = "begin anew: none was published yet"
    return [f"resuming would {where}", *problems]


def all_damaged(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether some were published, and a run can go on from none of them."""
    published = [checkpoint for checkpoint in checkpoints if checkpoint.published]
    return bool(published) and not any(checkpoint.valid for checkpoint in published)


def _does_not_fit(newest: Checkpoint, plan: Plan | None) -> str | None:
    if plan is None:
        return None
    if newest.step > plan.max_steps:
        return f"be refused: step {newest.step} lies beyond the end of its plan ({plan.max_steps} steps)"
    seen = newest.metadata.get("samples_consumed")
    if not isinstance(seen, int | None):
        return f"be refused: step {newest.step} does not say how many samples it has seen"
    if seen is not None and (newest.step < plan.begin.step or seen != samples_consumed(plan, newest.step)):
        return (
            f"be refused: step {newest.step} has seen {seen:,} samples where its plan counts "
            f"{samples_consumed(plan, newest.step):,} (see --allow batch.global_batch_size)"
        )
    return None


def _fact(checkpoint: Checkpoint, name: str, absent: str) -> str:
    return printable(str(checkpoint.metadata.get(name, absent))) if checkpoint.metadata else _UNKNOWN


def _age_of(checkpoint: Checkpoint, now: float) -> str:
    """Since the manifest was written; since the last change of the folder where there is none."""
    for path in (checkpoint.folder / MANIFEST, checkpoint.folder):
        try:
            return age(now - path.lstat().st_mtime)
        except OSError:
            continue
    return _UNKNOWN


def _state(checkpoint: Checkpoint) -> str:
    if checkpoint.valid:
        return "valid"
    return "damaged" if checkpoint.published else "unpublished"
