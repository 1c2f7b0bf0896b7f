"""single, ddp, fsdp: every process holds all adapters and their optimizer state; one flat all-reduce sums gradients.

One reduction for all three, in fp32 and in the order of the names: DDP's own buckets change after the first step, so a
resumed run of three or more ranks would sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.engine.host_read import start_read
from trainer.formats.portable import TrainedState, copy_trained_state, set_optimizer_state
from trainer.formats.sharded import DcpRankState, partition_by_size


class Replicated:
    """Gradients stay on their rank until the step's one reduction."""

    steps_in_backward = False
    loss_factor = 1.0
    backward_options: ClassVar[dict[str, bool]] = {}

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the model as accelerate wrapped it, and torch's own optimizer, before the first step."""
        self._optimizer = optimizer
        # `Module.zero_grad` walks over all modules: with 7B parameters the GPU waits 8 ms a step for that.
        wrapped.zero_grad = self._forget_gradients  # type: ignore[method-assign]

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        """`Module.zero_grad` of a model in which nothing else has gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def hide_unsharded_modules(self, model: PeftModel) -> AbstractContextManager[None]:
        """Hide nothing from the wrapping: DDP and FSDP2 take the model as it is."""
        return nullcontext()

    def generating(self, model: PeftModel) -> AbstractContextManager[None]:
        """Enter nothing: the model that trains can generate as it is."""
        return nullcontext()

    def no_sync(self, accelerator: Accelerator, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Keep gradients on this rank in the forward and backward of a micro-batch: DDP must not reduce them.

        FSDP2 has no gradients to reduce: what it shards does not train. Its switch would walk over all modules.
        """
        return accelerator.no_sync(wrapped) if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def all_reduce(self, values: Tensor, meanwhile: Callable[[], None]) -> tuple[list[float], float]:
        """Sum gradients and `values` [n] over the ranks, with the step's one host read: (sums, norm of the gradients).

        The sums are in `.grad` of every parameter, not yet clipped. `meanwhile` is called before the host waits for
        them: what it gives the GPU comes after them, and is not waited for.
        """
        flat_gradients = [cast(Tensor, parameter.grad).reshape(-1) for parameter in self.parameters.values()]
        gradients = torch.cat([*flat_gradients, values])
        if dist.is_initialized():
            dist.all_reduce(gradients)
        self._flat, sums = gradients[: -len(values)], gradients[-len(values) :]
        norm_and_sums = torch.cat([torch.linalg.vector_norm(self._flat)[None], sums])
        start = 0
        for parameter in self.parameters.values():
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        read = start_read(norm_and_sums)
        meanwhile()
        norm, *summed = read()
        return summed, norm

    def clip(self, max_norm: float, norm: float) -> None:
        """Scale the reduced gradients down to `max_norm` as torch's `clip_grad_norm_` does; 0 switches it off."""
        if 0 < max_norm < norm:
            self._flat.mul_(max_norm / (norm + 1e-6))
        del self._flat

    def full_state(self) -> TrainedState | None:
        """Copy adapters and optimizer state on rank 0, and return None on the others: all ranks have the same."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        assert self._optimizer is not None
        return copy_trained_state(self._optimizer, self.parameters)

    def rank_state(self, step: int) -> DcpRankState:
        """Copy this rank's share of adapters and optimizer state: all ranks have all of it, each writes a part."""
        assert self._optimizer is not None
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        mine = {name: self.parameters[name] for name in partition_by_size(sizes, ranks)[rank]}
        return DcpRankState(copy_trained_state(self._optimizer, mine))

    def weights(self) -> dict[str, Tensor] | None:
        """Return the adapters by name on rank 0, and None on the others."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return None
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_optimizer_state(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Put a stored optimizer state (`<parameter>.<exp_avg, exp_avg_sq or step>`) into the optimizer."""
        assert self._optimizer is not None
        set_optimizer_state(self._optimizer, self.parameters, optimizer_state)
