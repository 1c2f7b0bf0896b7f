"""The strategies: what each shares out, how it stores packed weights, and what the launcher must have made of it."""

from __future__ import annotations

# strategy -> (accelerate's distributed types, the class that accelerate wraps the model in)
_EXPECTED = {
    "single": ({"NO"}, "PeftModelForCausalLM"),
    "ddp": ({"MULTI_GPU", "MULTI_CPU"}, "DistributedDataParallel"),
    "fsdp": ({"FSDP"}, "FSDPPeftModelForCausalLM"),
    "zero2": ({"DEEPSPEED"}, "DeepSpeedEngine"),
    "zero3": ({"DEEPSPEED"}, "DeepSpeedEngine"),
}

ZERO_STAGES = {"zero2": 2, "zero3": 3}

SHARDING = ("fsdp", "zero3")
"""Strategies that cut the decoder layers over the processes."""
_ZERO = ("zero2", "zero3")


STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")


def storage_of(strategy: str) -> str:
    """dtype in which packed 4-bit weights are stored: bytes, or what FSDP can cut without changing them."""
    return "float16" if strategy == "fsdp" else "uint8"
