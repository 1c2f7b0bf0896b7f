"""Which products' kernels are loaded between the first step and the second: those of the micro-batches after it.

They are known from the trial of the largest micro-batch, which a run that goes on has not. Later steps find most of
their kernels loaded: the fewer are left, the longer a run is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from trainer.model.products_ahead import SeenProducts, compute_ahead

if TYPE_CHECKING:
    from trainer.loop.trainer import PlannedTrainer

_TOKENS, _MICRO_BATCHES = 130_000, 40
"""At most computed ahead: half a second of an H200 and its host."""


def sizes_of(trainer: PlannedTrainer, samples: Sequence[int]) -> dict[str, int]:
    """Return the rows of a micro-batch's products: its tokens, visual tokens, and patches of images."""
    split, positions = trainer.index.splits["train"], list(samples)
    merge = int(cast(Any, trainer.model.get_base_model()).model.visual.spatial_merge_size)
    visual = int(split.visual_tokens[positions].sum())
    return {"tokens": split.computed_tokens(positions), "visual": visual, "patches": visual * merge**2}


def products_of(trainer: PlannedTrainer, samples: Sequence[int]) -> SeenProducts:
    """Return what records the products of a micro-batch of these samples."""
    return SeenProducts(sizes_of(trainer, samples))


def load_kernels_ahead(trainer: PlannedTrainer, seen: SeenProducts) -> None:
    """Compute the products seen with the rows of the micro-batches to come on this rank."""
    compute_ahead(seen.products, _coming(trainer), trainer.args.device)


def _coming(trainer: PlannedTrainer) -> Iterator[dict[str, int]]:
    tokens = count = 0
    for step in range(trainer.state.global_step, trainer.plan.max_steps):
        for batch in trainer.step_plan.micro_batches_of(step, trainer.args.process_index):
            sizes = sizes_of(trainer, batch.samples)
            tokens, count = tokens + sizes["tokens"], count + 1
            if tokens > _TOKENS or count > _MICRO_BATCHES:
                return
            yield sizes
