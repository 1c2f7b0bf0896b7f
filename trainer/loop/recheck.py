"""Some micro-batches computed a second time by another rank, to find hardware that computes wrongly in silence.

A GPU can give wrong numbers without any error (Dixit et al., "Silent Data Corruptions at Scale", 2021), and the step's
reduction then carries them to all ranks. `training.recheck` is the share of the micro-batches that are checked; 0, the
default, checks none. Whether the n-th micro-batch of a step is, depends on seed, step and n alone, so no rank has to
ask. Where it is, every rank also computes the one of the rank before it (the first rank that of the last one): all are
checked in the time of one more micro-batch, and none waits for another. One process alone computes its own again.

Nothing of the run moves: the second computation reads its samples anew, touches no gradient that is added up, no
generator and no cache, and the dropout masks belong to the samples.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from launch.audit.diff import NORM_FACTOR, tolerance_of
from launch.errors import RunError
from launch.planning.plan import Plan
from launch.planning.rechecks import is_drawn
from trainer.checks.fingerprint import projections
from trainer.data.micro_batches import PackedBatch
from trainer.distributed.collectives import gather_objects, run_on_all_ranks
from trainer.loop.dataloaders import training_batches, uncached

if TYPE_CHECKING:
    from trainer.loop.trainer import PlannedTrainer


@dataclass(frozen=True)
class Computed:
    """What a rank got of a micro-batch: its share of the step's loss, and of its gradients the `projections`.

    `projections`: one row of 5 for each adapter, zeros where it got no gradient.
    """

    loss: float
    projections: list[list[float]]


@dataclass(frozen=True)
class Report:
    """One rank's own micro-batch (None: it had no memory for it), and the one of the rank before it.

    `share`: target tokens of its own, as a share of the step's; `device`: where it computes, for the user.
    """

    own: Computed | None
    again: Computed
    share: float
    device: str


@dataclass(frozen=True)
class Apart:
    """By how much two computations of one micro-batch differ: loss and gradients, relative. 0, 0: to no bit."""

    loss: float = 0.0
    gradients: float = 0.0

    def is_beyond(self, limits: Apart) -> bool:
        """Return whether rounding does not explain it."""
        return self.loss > limits.loss or self.gradients > limits.gradients


SIXTEEN_BITS = Apart(5e-3, 5e-2)
"""What rounding explains with 16-bit products.

Measured on H200s of two machines, the 7B shape, 36 micro-batches of 14,000 to 27,000 tokens (12 by one process, 12
each between the two ranks of ddp and of fsdp), features kept or not: losses equal to the bit; gradients 1.6e-3 to
8.7e-3 apart, 3.8e-3 in the median, which is one rounding of bfloat16 (kernels add in any order). Their logarithms
spread by 0.39, so that 5e-2 is 6.7 standard deviations away: no run of any length meets it. For losses more than twice
what kernels of other shapes may differ by (2e-3, `launch.audit.diff.TOLERANCES`): ranks may tune theirs otherwise.
"""


class Recheck:
    """Goes around every micro-batch of a trainer whose recipe asks for it. Used by all ranks alike."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self._trainer = trainer
        self._step, self._number = -1, 0
        self._checked = 0
        self._largest = Apart()

    def around(self, batch: PackedBatch, compute: Callable[[], Tensor]) -> Tensor:
        """Compute this rank's micro-batch, and where it is to be checked that of the rank before. Then collectives.

        Raises:
            RunError: on all ranks: the computations differ by more than rounding explains.
            SamestepError: on all ranks: one could not read or compute what it should.
        """
        self._number = self._number + 1 if batch["step"] == self._step else 0
        self._step = batch["step"]
        training = self._trainer.recipe.training
        if not is_drawn(training.seed, self._step, self._number, training.recheck):
            return compute()
        again = self._compute_other()  # first: DeepSpeed takes the step in its last backward
        with _watched(self._trainer.parameters) as gradients:
            loss = compute()
        own = None if self._trainer.out_of_memory else self._computed(loss, gradients)
        share = batch["inputs"]["shift_labels"].numel() / batch["step_target_tokens"]
        self._judge(gather_objects(Report(own, again, share, _describe(self._trainer.args.device))))
        return loss

    def summary(self) -> str:
        """Describe for the log what was checked, and how far from equal it was."""
        limits = limits_of(self._trainer.plan)
        return (
            f"recheck: {self._checked} micro-batches of every rank were computed twice; losses differ by "
            f"{self._largest.loss:.1e} at most, gradients by {self._largest.gradients:.1e} "
            f"(rounding explains {limits.loss:.0e} and {limits.gradients:.0e})"
        )

    def _compute_other(self) -> Computed:
        """Compute the micro-batch of the rank before; its gradients go nowhere else. Collectives.

        `grad` instead of `backward`: neither DDP's nor DeepSpeed's hooks on the adapters' gradients hear of it.
        """
        trainer = self._trainer
        rank = (trainer.args.process_index - 1) % trainer.args.world_size
        batches = training_batches(trainer.task, uncached(trainer.encoder), trainer.step_plan, rank)
        number = self._step * trainer.plan.micro_batches + self._number
        batch = run_on_all_ranks(lambda: batches.batch(number))
        batch["inputs"]["fresh_images"] = ()  # the cache of vision features is not to hear of them
        parameters, device = trainer.parameters, trainer.args.device

        def compute() -> Computed:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                loss = trainer.micro_batch_loss(trainer.model, batch)
                scaled = loss * trainer.engine.loss_factor
                gradients = torch.autograd.grad(scaled, list(parameters.values()), allow_unused=True)
            named = zip(parameters, gradients, strict=True)
            rows = {name: projections(gradient) for name, gradient in named if gradient is not None}
            return self._computed(loss.detach(), rows)

        if trainer.plan.parallelism.shards_layers:
            return compute()  # in the layers' collectives: what fails there ends the others by the launcher
        return run_on_all_ranks(compute)

    def _computed(self, loss: Tensor, rows: Mapping[str, Tensor]) -> Computed:
        none = torch.zeros(5, dtype=torch.float64, device=loss.device)
        return Computed(
            float(loss), torch.stack([rows.get(name, none) for name in self._trainer.parameters]).tolist()
        )

    def _judge(self, reports: Sequence[Report]) -> None:
        limits, differences = limits_of(self._trainer.plan), differences_of(reports)
        self._checked += 1
        self._largest = Apart(
            max(self._largest.loss, *(apart.loss for apart in differences)),
            max(self._largest.gradients, *(apart.gradients for apart in differences)),
        )
        if any(apart.is_beyond(limits) for apart in differences):
            micro_batch = f"micro-batch {self._number + 1} of {self._trainer.plan.micro_batches}"
            error = RunError(describe_fault(reports, limits, f"step {self._step + 1}, {micro_batch}"))
            error.agreed = True  # every rank has the same reports
            raise error


def limits_of(plan: Plan) -> Apart:
    """Return what rounding explains between two computations of one micro-batch on hardware of the same kind.

    `tolerance_of` is for the loss of a whole step. A micro-batch has a tenth of its tokens or less, over which less
    evens out, and gradients have values of both signs. In float32 these are the figures by which `samestep diff --deep`
    compares outputs and gradients of a micro-batch.
    """
    if plan.compute_dtype != "float32":
        return SIXTEEN_BITS
    loss = NORM_FACTOR * tolerance_of(plan)
    return Apart(loss, NORM_FACTOR * loss)


def differences_of(reports: Sequence[Report]) -> list[Apart]:
    """Return by how much each rank's micro-batch came out otherwise on the rank after it."""
    return [
        Apart() if report.own is None else _apart(report.own, after.again, report.share)
        for report, after in zip(reports, [*reports[1:], reports[0]], strict=True)
    ]


def _apart(own: Computed, again: Computed, share: float) -> Apart:
    """Compare two computations. A loss is held against at least 1 a target token: where a model is sure of its answer
    the loss is all rounding."""
    first, second = (torch.tensor(each.projections, dtype=torch.float64) for each in (own, again))
    # A sum with random signs has the squared norm for its expected square: of all adapters' differences together.
    gradients = float(torch.linalg.vector_norm(first[:, 1:] - second[:, 1:])) / 2
    norms = [float(torch.linalg.vector_norm(each[:, 0])) for each in (first, second)]
    return Apart(
        _relative(abs(own.loss - again.loss), own.loss, again.loss, share), _relative(gradients, *norms)
    )


def _relative(difference: float, *sizes: float) -> float:
    """Relative to the largest size; infinite where one of two numbers is none. Where both are none the step says so."""
    if not math.isfinite(difference):
        return 0.0 if not any(math.isfinite(size) for size in sizes[:2]) else math.inf
    return difference / max(abs(size) for size in sizes) if difference else 0.0


def describe_fault(reports: Sequence[Report], limits: Apart, place: str) -> str:
    """Name the faulty ranks: those that differ from both their neighbours, among three ranks or more; else who might be
    it."""
    differences = differences_of(reports)
    beyond = [apart.is_beyond(limits) for apart in differences]
    ranks = range(len(reports))
    certain = [rank for rank in ranks if len(reports) > 2 and beyond[rank] and beyond[rank - 1]]
    possible = [rank for rank in ranks if beyond[rank] or beyond[rank - 1]]
    named = certain or possible
    owner = next(rank for rank in ranks if beyond[rank])
    other = (owner + 1) % len(reports)
    own = reports[owner].own
    assert own is not None
    suspects = " and ".join(f"rank {rank} ({reports[rank].device})" for rank in named)
    if certain:
        verdict = f"{suspects} computed otherwise than the ranks on both sides"
    elif len(named) > 1:
        verdict = f"{suspects} computed the same micro-batch otherwise, and one of them is wrong"
    else:
        verdict = f"{suspects} computed the same micro-batch otherwise the second time"
    apart = differences[owner]
    return (
        f"{place}: {verdict} (loss {own.loss:.9g} on rank {owner} and {reports[other].again.loss:.9g} on rank {other}, "
        f"{apart.loss:.1e} apart, gradients {apart.gradients:.1e}; rounding explains {limits.loss:.0e} and "
        f"{limits.gradients:.0e}); leave this hardware out, look at it with `samestep doctor`, and the same command "
        "goes on from the newest checkpoint"
    )


def _describe(device: torch.device) -> str:
    """Name the host, and the GPU by index, kind and the UUID that `nvidia-smi -L` shows."""
    if device.type != "cuda":
        return f"host {platform.node()}, CPU"
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"host {platform.node()}, GPU {index}, {properties.name}, GPU-{properties.uuid}"


@contextmanager
def _watched(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Give the `projections` of the gradients that arrive in the block, before anything is added to them."""
    rows: dict[str, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:  # what a hook returns would replace the gradient
        rows[name] = projections(gradient)

    handles = [parameter.register_hook(partial(keep, name)) for name, parameter in parameters.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
