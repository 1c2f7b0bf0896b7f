"""What could corrupt a run without an error is checked here and named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from launch.errors import RunError
from launch.plan import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

# strategy -> (accelerate's distributed types, the class that accelerate wraps the model in)
_EXPECTED = {
    "single": ({"NO"}, "PeftModelForCausalLM"),
    "ddp": ({"MULTI_GPU", "MULTI_CPU"}, "DistributedDataParallel"),
}


def check_launch(plan: Plan, accelerator: Accelerator, wrapped: nn.Module) -> None:
    """Every rank: world size, distributed type and wrapper class are what the plan says.

    `accelerate launch` can start one process where several were asked for, or wrap nothing (accelerate 1.15,
    `MULTI_CPU` with `num_processes: 2`; FSDP on a CPU), and reports success.

    Raises:
        RunError: they are not.
    """
    types, wrapper = _EXPECTED[plan.strategy]
    found = (accelerator.num_processes, accelerator.distributed_type.value, type(wrapped).__name__)
    if found[0] != plan.world_size or found[1] not in types or found[2] != wrapper:
        raise RunError(
            f"rank {accelerator.process_index}: the launcher started {found[0]} processes of type {found[1]} with the "
            f"model in {found[2]}, the plan wants {plan.world_size}, {' or '.join(sorted(types))}, {wrapper}; "
            "check the accelerate config and --num_processes"
        )


def check_adapters(parameters: dict[str, nn.Parameter]) -> None:
    """Adapters train in fp32 (trl casts those of a quantized model to bf16), and nothing else trains.

    Raises:
        RunError: they do not.
    """
    if not parameters:
        raise RunError("model: nothing trains; lora.target_modules matched no layer")
    for name, parameter in parameters.items():
        if "lora_" not in name:
            raise RunError(f"model: {name} would train; only LoRA weights may")
        if parameter.dtype != torch.float32:
            raise RunError(f"model: the adapter {name} is {parameter.dtype}, not float32")


def check_finite(loss: float, grad_norm: float, step: int, samples: list[int]) -> None:
    """Before the weights change, on every rank with the same numbers.

    Raises:
        RunError: loss or gradient norm is not a finite number.
    """
    if abs(loss) == float("inf") or loss != loss or abs(grad_norm) == float("inf") or grad_norm != grad_norm:
        error = RunError(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the weights are unchanged; the step's "
            f"samples are {samples}; lower training.learning_rate, or look at these samples"
        )
        error.agreed = True  # the numbers are sums over all ranks
        raise error
