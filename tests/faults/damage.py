"""What happens to the files of a run between two attempts at it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from launch.checkpoints.scan import scan_checkpoints
from launch.run.directory import RunDirectory

GARBAGE = bytes(random.Random(0).randrange(256) for _ in range(400))


def valid_steps(run: RunDirectory) -> list[int]:
    """Steps of the checkpoints that a run could go on from, oldest first."""
    return [found.step for found in scan_checkpoints(run.path) if found.valid] if run.path.is_dir() else []


def damage(target: str, run: RunDirectory, cache: Path, share: float) -> None:
    """Do one of `drawing.DAMAGES`. `share`: which file, and where in it, from 0 to 1. The run has two checkpoints."""
    what, _, how = target.partition(": ")
    newest = run.checkpoint(valid_steps(run)[-1])
    published = sorted(file for file in newest.iterdir() if file.name != "manifest.json")
    index = sorted(file for file in (cache / "index").rglob("*") if file.is_file())
    one = {"newest checkpoint": published, "prepared index": index}.get(what, [run.metrics_file])
    file = one[int(share * len(one))]
    if how in ("a file cut", "cut") and what != "plan.json":
        _cut(file, share)
    elif how == "a byte flipped":
        _flip(file, share)
    elif how == "a file missing":
        file.unlink()
    elif how == "manifest missing":
        (newest / "manifest.json").unlink()
    elif how == "manifest cut":
        _cut(newest / "manifest.json", share)
    elif how == "a foreign file":
        (newest / "notes.txt").write_text("of somebody else\n")
    elif how == "half a line at its end":
        with (run.path / what).open("a") as lines:
            lines.write('{"step": 9')
    elif target == "prepared index: missing":
        shutil.rmtree(cache / "index")
    else:
        _leave(target, run)


def _leave(target: str, run: RunDirectory) -> None:
    """What is about the run's folder itself."""
    if target == "marker: random bytes":
        (run.path / "REFUSED").write_bytes(GARBAGE)
    elif target == "marker: DONE of a step not taken":
        last = json.loads(run.plan_file.read_text())["max_steps"]
        (run.path / "DONE").write_text(f"step {last}")
    elif target == "plan.json: cut":
        _cut(run.plan_file, 0.5)
    elif target in ("plan.json: missing", "environment.json: missing"):
        (run.path / target.partition(":")[0]).unlink(missing_ok=True)
    elif target == "an unpublished checkpoint left":
        folder = run.path / f"checkpoint-{valid_steps(run)[-1] + 2}.partial"
        folder.mkdir(exist_ok=True)
        (folder / "optimizer.safetensors").write_bytes(GARBAGE)
    elif target in ("STOP left", "SAVE left"):
        (run.path / target.partition(" ")[0]).write_text("user\n")
    elif target == "lock: random bytes":
        (run.path / ".lock").write_bytes(GARBAGE)
    else:
        raise ValueError(target)


def _cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def _flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 0xFF
    file.write_bytes(content)
