"""A run's folder with everything that a report shows, written without training."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch.report import gallery
from launch.run.directory import RunDirectory, write_marker
from launch.slurm.attempts import write_event
from tests.helpers.attempts import attempt, recipe_of
from tests.helpers.launcher import write_adapter

HOSTILE = '</script><script>window.broken=1</script><img src=x onerror="window.broken=2">{{ 7*7 }} <!--'
"""A text that would script a page, or break it, wherever it is put without being escaped."""


def reported_run(folder: Path, questions: int = 20, right: int = 12, *overrides: str) -> RunDirectory:
    """A run that is done: 30 steps, three validation losses, an evaluation, two attempts of a job, a merge."""
    run = RunDirectory(folder)
    recipe = recipe_of(8, f"data.system_message={json.dumps(HOSTILE)}", *overrides)
    attempt(run, recipe, save=20)
    lines = [
        {"step": step, "loss": 4 / step, "grad_norm": 1.0 + step % 3, "learning_rate": 1e-3, "tokens": 4000,
         "samples": 8, "samples_digest": f"{step:016x}", "seconds": 0.5, "memory_allocated": 2**30 + step,
         "memory_reserved": 2**31}
        for step in range(1, 31)
    ]  # fmt: skip
    run.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    losses = [{"step": step, "loss": 1 / step, "samples": 20} for step in (10, 20, 30)]
    run.evaluations_file.write_text("".join(f"{json.dumps(line)}\n" for line in losses))
    run.environment_file.write_text(
        json.dumps({"device": "NVIDIA H100", "python": "3.11", "host": "secret-host"})
    )
    run.eval_file().write_text(json.dumps(evaluation_of(questions, right)))
    write_event(run, "start", job="7", restart=0, began=1.7e9, first_step=0, nodes="n1")
    write_event(
        run,
        "end",
        job="7",
        restart=0,
        how="preempted",
        reason="preempted: at step 20",
        last_step=20,
        ended=1.7e9,
    )
    write_event(run, "start", job="7", restart=1, began=1.7e9, first_step=20, nodes="n[1-2]")
    write_event(run, "end", job="7", restart=1, how="done", reason="step 30", last_step=30, ended=1.7e9)
    write_adapter(run.adapter)
    run.merged.mkdir()
    record = {"base": "original", "tensors": 58, "changed": 14, "byte_identical": 44, "rounded": 0, "converted": 0,
              "largest_error": 4e-8, "base_comparison": HOSTILE}  # fmt: skip
    (run.merged / "merge.json").write_text(json.dumps(record))
    write_marker(run, "DONE", "step 30")
    return run


def evaluation_of(questions: int, right: int) -> dict[str, Any]:
    """eval.json: the base knows every fifth answer, the adapter the first `right`; texts that want to be scripts."""
    predictions = [
        {
            "row": row,
            "query": f"How many? {HOSTILE}" if row % 2 else f"What is the value of bar {row}?",
            "label": [HOSTILE if row == 3 else str(row)],
            "human_or_machine": row % 2,
            "base": {"prediction": HOSTILE, "correct": row % 5 == 0},
            "adapter": {"prediction": str(row), "correct": row < right},
        }
        for row in range(questions)
    ]
    return {"split": "test", "accuracy": {"base": {}, "adapter": {}}, "predictions": predictions}


def stand_in_for_images(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Grey charts in the place of the child that reads them. Returns the arguments of its calls."""
    calls: list[list[str]] = []

    def write(module: str, arguments: Sequence[str]) -> None:
        calls.append([module, *arguments])
        buffer = io.BytesIO()
        Image.new("RGB", (320, 200), "grey").save(buffer, "WEBP")
        for row in arguments[arguments.index("--rows") + 1].split(","):
            Path(arguments[arguments.index("--output") + 1], f"{row}.webp").write_bytes(buffer.getvalue())

    monkeypatch.setattr(gallery, "call_module", write)
    return calls
