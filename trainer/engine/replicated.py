"""single, ddp, fsdp: every process holds all adapters and moments; gradients are added up in one flat all-reduce.

One reduction for all three, in fp32 and in the order of the names: DDP's own buckets change after the first step, so a
resumed run of three or more ranks would sum in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from trainer.formats.portable import State, inject, snapshot
from trainer.formats.sharded import DistributedPart, partition_by_size


class Replicated:
    """Gradients stay on their rank until the step's one reduction."""

    steps_in_backward = False
    loss_factor = 1.0

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._optimizer: torch.optim.Optimizer | None = None

    def started(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Training begins: the model as accelerate wrapped it, torch's own optimizer."""
        self._optimizer = optimizer
        # Its own walks over all modules: with 7B parameters the GPU waits 8 ms a step for that.
        wrapped.zero_grad = self._forget_gradients  # type: ignore[method-assign]

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        """`Module.zero_grad` of a model in which nothing else has gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def outside_training(self, model: PeftModel) -> AbstractContextManager[None]:
        """What the wrapping must not see of the model: nothing here."""
        return nullcontext()

    def generating(self, model: PeftModel) -> AbstractContextManager[None]:
        """Around answers of the model that trains."""
        return nullcontext()

    def keep_gradients(self, accelerator: Accelerator, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Around the forward and backward of a micro-batch."""
        return accelerator.no_sync(wrapped) if dist.is_initialized() else nullcontext()

    def add_up(self, told: Tensor) -> tuple[list[float], float]:
        """Sum gradients and `told` [n] over the ranks, with the step's one host read: (sums, norm of the gradients).

        The sums are in `.grad` of every parameter, not yet clipped.
        """
        parts = [cast(Tensor, parameter.grad).reshape(-1) for parameter in self.parameters.values()]
        gradients = torch.cat([*parts, told])
        if dist.is_initialized():
            dist.all_reduce(gradients)
        self._flat, sums = gradients[: -len(told)], gradients[-len(told) :]
        norm, *values = torch.cat([torch.linalg.vector_norm(self._flat)[None], sums]).tolist()
        start = 0
        for parameter in self.parameters.values():
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return values, norm

    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the gradients down to `max_norm`, as torch's `clip_grad_norm_`; 0 never does."""
        if 0 < max_norm < norm:
            self._flat.mul_(max_norm / (norm + 1e-6))
        del self._flat

    def state(self) -> State | None:
        """Copies of adapters and moments, on rank 0 alone: all ranks have the same."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        assert self._optimizer is not None
        return snapshot(self._optimizer, self.parameters)

    def part(self, step: int) -> DistributedPart:
        """Copies of this rank's share of adapters and moments: all ranks have the same, each writes other ones."""
        assert self._optimizer is not None
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        mine = {name: self.parameters[name] for name in partition_by_size(sizes, ranks)[rank]}
        return DistributedPart(snapshot(self._optimizer, mine))

    def weights(self) -> dict[str, Tensor] | None:
        """The adapters by name, on rank 0 alone."""
        return (
            None
            if dist.is_initialized() and dist.get_rank() != 0
            else {name: parameter.detach() for name, parameter in self.parameters.items()}
        )

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Put stored moments and step counts (`<parameter>.<moment or step>`) into the optimizer."""
        assert self._optimizer is not None
        inject(self._optimizer, self.parameters, moments)
