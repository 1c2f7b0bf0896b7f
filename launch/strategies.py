"""The strategies: for each one value that says what is sharded, how packed weights are stored, and who does it.

Whoever needs to know something of a strategy asks its value (`STRATEGIES[name]`, `plan.parallelism`); nobody compares
names. On disk and on the command line a strategy is its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Strategy:
    """How the processes of a run share one model."""

    name: str
    """The stem of its file in accelerate_configs/."""
    engine: Literal["none", "ddp", "fsdp", "deepspeed"]
    """What wraps the model, reduces the gradients and holds the optimizer state; `none` is one process."""
    sharded: Literal["nothing", "optimizer", "layers"]
    """What is cut over the processes: `optimizer` is its state and the gradients, `layers` the frozen weights too."""
    quant_storage: Literal["uint8", "float16"]
    """dtype in which packed 4-bit weights are stored: bytes, or what FSDP can cut without changing them."""
    distributed_types: frozenset[str]
    """accelerate's `DistributedType` of a correct launch."""
    wrapper: str
    """The class that accelerate has put around the model when training starts."""
    zero_stage: int = 0
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""

    @property
    def config_file(self) -> str:
        """Its file in accelerate_configs/."""
        return f"{self.name}.yaml"

    @property
    def is_one_process(self) -> bool:
        """It starts no launcher's workers: `torchrun` is not involved."""
        return self.engine == "none"

    @property
    def is_zero(self) -> bool:
        """DeepSpeed does the work."""
        return self.engine == "deepspeed"

    @property
    def shards_layers(self) -> bool:
        """No process ever holds the whole weights: a decoder layer is cut (FSDP2) before the next is read, and gathered
        from all processes to be computed."""
        return self.sharded == "layers"

    @property
    def is_compared_when_wrapped(self) -> bool:
        """An engine is put around the model after it was built, which could change what it computes."""
        return self.engine in ("ddp", "deepspeed")


# Sharded layers: float16. FSDP2's copies rewrite bfloat16 that looks like NaN, and it leaves bytes whole on all ranks.
_ALL = (
    Strategy("single", "none", "nothing", "uint8", frozenset({"NO"}), "PeftModelForCausalLM"),
    Strategy(
        "ddp", "ddp", "nothing", "uint8", frozenset({"MULTI_GPU", "MULTI_CPU"}), "DistributedDataParallel"
    ),
    Strategy("fsdp", "fsdp", "layers", "float16", frozenset({"FSDP"}), "FSDPPeftModelForCausalLM"),
    Strategy("zero2", "deepspeed", "optimizer", "uint8", frozenset({"DEEPSPEED"}), "DeepSpeedEngine", 2),
    Strategy("zero3", "deepspeed", "layers", "float16", frozenset({"DEEPSPEED"}), "DeepSpeedEngine", 3),
)

STRATEGIES: Mapping[str, Strategy] = MappingProxyType({strategy.name: strategy for strategy in _ALL})
"""Every strategy by its name."""

AUTO = "auto"
"""In a request, in the place of a name: `launch.planning.auto_strategy.resolve_strategy` puts one there."""


def default_strategy(world_size: int) -> Strategy:
    """The fastest strategy of so many processes where the model fits each: it replicates it."""
    return STRATEGIES["single" if world_size == 1 else "ddp"]
