"""Which CUDA graphs are captured, and when: those that the coming steps need, each once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from launch.planning.step_plan import SampleStream, StepPlan
from trainer.loop.graphs_ahead import GraphsAhead
from trainer.model.filled_rows import Bucket


class Graphs:
    """Notes what it is asked for, in the place of `LayerGraphs`."""

    def __init__(self) -> None:
        self.calls: list[list[Bucket]] = []

    def capture(self, buckets: Iterable[Bucket]) -> str | None:
        self.calls.append(list(buckets))
        return None


def test_the_buckets_of_the_coming_steps_are_asked_for_once_and_up_to_the_end_of_the_run() -> None:
    tokens = np.arange(500, 900)
    plan = StepPlan(
        stream=SampleStream(n=400, global_batch_size=8, seed=3, fingerprint="f"),
        world_size=2,
        max_steps=40,
        micro_batches=1,
        budget=4096,
        tokens=tokens,
        costs=tokens.astype(float),
    )
    graphs = Graphs()
    ahead = GraphsAhead(graphs)  # type: ignore[arg-type]
    for step in range(1, 41):
        ahead.capture(plan, tokens, 1, step)
    counts = [len(each) for each in graphs.calls]
    assert counts == [32] + [1] * 7 + [0] * 32  # steps 1 to 32, then one more with each step, until the last
    samples = plan.micro_batches_of(1, 1)[0].samples
    assert graphs.calls[0][0].tokens - int(tokens[list(samples)].sum()) in range(128)
    GraphsAhead(None).capture(plan, tokens, 1, 1)
