"""CUDA graphs for the steps to come, captured while the GPU computes and the host would only wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.logging import get_logger

from trainer.model.filled_rows import bucket_of
from trainer.model.layer_graphs import LayerGraphs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from launch.planning.step_plan import StepPlan

logger = get_logger("trainer")
_STEPS_AHEAD = 32


class GraphsAhead:
    """Knows from the step plan which sizes of micro-batches come. `graphs`: None where nothing is captured."""

    def __init__(self, graphs: LayerGraphs | None) -> None:
        self._graphs = graphs
        self._known_steps = 0

    def capture(self, steps: StepPlan, tokens: NDArray[np.int64], rank: int, next_step: int) -> None:
        """Capture what this rank's micro-batches of the steps from `next_step` on need, and lack.

        `tokens`: of every sample of the split.
        """
        if self._graphs is None:
            return
        coming = range(max(next_step, self._known_steps), min(next_step + _STEPS_AHEAD, steps.max_steps))
        self._known_steps = coming.stop
        micro_batches = [each for step in coming for each in steps.micro_batches_of(step, rank)]
        buckets = [bucket_of(tokens[list(each.samples)].tolist()) for each in micro_batches]
        if report := self._graphs.capture(buckets):
            logger.info(report)
