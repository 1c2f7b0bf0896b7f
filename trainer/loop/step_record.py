"""Where the time of every step goes on every rank, and for whom and for what ranks wait. Off by default.

With `SAMESTEP_STEP_RECORD=1` in the environment of the first rank, each rank adds a line a step to
`logs/steps-of-rank-<rank>.jsonl` in the run's folder, and every hundred steps the log says who was waited for. All
times are of one rank's own clock, so machines need not agree on it: who waits least for the others is the one they
waited for, and the phase in which it took longer than the others is the reason.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate.logging import get_logger

from launch.run.directory import RunDirectory
from trainer.data.loader import DATA_WAIT
from trainer.distributed.collectives import broadcast_from_main, gather_objects

VARIABLE = "SAMESTEP_STEP_RECORD"
PHASES = ("data", "features", "launching", "GPU", "reduction", "rest")
"""Waiting for a micro-batch; at the step's begin, reading vision features that came into the cache too late to be read
ahead; the host's part of forward and backward; waiting for the own GPU to finish them; waiting for the other ranks and
adding up; everything else, such as the optimizer, figures, saves, evaluations and the features that are read ahead.
Engines that shard wait for each other in the passes too, which is in `launching` and `GPU`."""
_STEPS_OF_A_SUMMARY = 100

Row = Mapping[str, float]

logger = get_logger("trainer")


class StepRecord:
    """Times the phases of this rank's steps. `file`: where its lines go; None: nothing is timed."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._rows: list[Row] = []
        self._began = time.perf_counter()
        self._waited_for_data = DATA_WAIT.seconds

    @staticmethod
    def of_run(run: RunDirectory, rank: int) -> StepRecord:
        """Open the record that the first rank's environment asks for. A collective."""
        if not broadcast_from_main(lambda: os.environ.get(VARIABLE, "") not in ("", "0")):
            return StepRecord()
        return StepRecord(run.path / "logs" / f"steps-of-rank-{rank}.jsonl")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of what is inside to a phase, without that of phases inside it."""
        if self._file is None:
            yield
            return
        began, others = time.perf_counter(), sum(self._seconds.values())
        try:
            yield
        finally:
            inside = sum(self._seconds.values()) - others
            self._seconds[name] += time.perf_counter() - began - inside

    def wait_for_gpu(self) -> None:
        """Wait for what the GPU was given, which the reduction would do in silence, and after the next step's tower."""
        if self._file is not None and torch.cuda.is_available():
            with self.phase("GPU"):
                torch.cuda.synchronize()

    def begin(self) -> None:
        """Count from now on: what came before belongs to no step."""
        self._began, self._waited_for_data = time.perf_counter(), DATA_WAIT.seconds
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def end_step(self, step: int) -> None:
        """Write a step's line; after a hundred of them log a summary. Then a collective."""
        if self._file is None:
            return
        self._seconds["data"] = DATA_WAIT.seconds - self._waited_for_data
        self._seconds["rest"] = max(0.0, time.perf_counter() - self._began - sum(self._seconds.values()))
        self._rows.append({"step": step, **{name: round(spent, 6) for name, spent in self._seconds.items()}})
        with suppress(OSError):  # the run does not end for want of its record
            self._file.parent.mkdir(exist_ok=True)
            with self._file.open("a") as handle:
                handle.write(json.dumps(self._rows[-1]) + "\n")
        if len(self._rows) == _STEPS_OF_A_SUMMARY:
            self.summarize()
        self.begin()

    def summarize(self) -> None:
        """Log a summary of the steps since the last one. A collective, where there are any."""
        if self._rows:
            for line in summary(gather_objects(self._rows)):
                logger.info(line)
            self._rows = []


def summary(rows_by_rank: Sequence[Sequence[Row]]) -> list[str]:
    """Say in a few lines what the same steps of all ranks went into, and who was waited for, how long and for what."""
    steps = [int(row["step"]) for row in rows_by_rank[0]]
    whole = statistics.mean(sum(row[name] for name in PHASES) for rows in rows_by_rank for row in rows)
    means = {name: statistics.mean(row[name] for rows in rows_by_rank for row in rows) for name in PHASES}
    lines = [
        f"steps {steps[0]} to {steps[-1]}: {whole:.3f} s each, "
        + ", ".join(f"{name} {spent:.3f}" for name, spent in means.items())
    ]
    if len(rows_by_rank) < 2:
        return lines
    waited, reasons = [], Counter[tuple[int, str]]()
    for rows in zip(*rows_by_rank, strict=True):
        waits = [row["reduction"] for row in rows]
        last = waits.index(min(waits))
        waited.append(statistics.mean(waits) - waits[last])
        reasons[last, _reason(rows, last)] += 1
    lines.append(
        f"steps {steps[0]} to {steps[-1]}: ranks waited {statistics.mean(waited):.3f} s of a step for the last one "
        f"({statistics.mean(waited) / whole:.1%}); last: {_last_ranks(reasons)}"
    )
    return lines


def _reason(rows: Sequence[Row], last: int) -> str:
    """The phase before the reduction in which a rank took longest, beside the median of the others."""

    def longer(phase: str) -> float:
        others = [row[phase] for rank, row in enumerate(rows) if rank != last]
        return rows[last][phase] - statistics.median(others)

    return max((phase for phase in PHASES if phase != "reduction"), key=longer)


def _last_ranks(reasons: Counter[tuple[int, str]]) -> str:
    """The ranks that were last most often, at most four, each with its reasons."""
    by_rank: dict[int, Counter[str]] = {}
    for (rank, phase), count in reasons.items():
        by_rank.setdefault(rank, Counter())[phase] += count
    ordered = sorted(by_rank.items(), key=lambda each: (-each[1].total(), each[0]))[:4]
    return "; ".join(
        f"rank {rank} in {counts.total()} steps ({', '.join(f'{phase} {n}' for phase, n in counts.most_common())})"
        for rank, counts in ordered
    )
