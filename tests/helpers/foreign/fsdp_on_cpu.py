"""Test-only: FSDP on the CPU. accelerate 1.15 makes FSDP out of MULTI_GPU and its like, never out of MULTI_CPU.

So the product refuses it there.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from launch.rules import checks, request_rules

_plain_init = AcceleratorState.__init__


def _init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    _plain_init(self, *args, **kwargs)
    plugin: FullyShardedDataParallelPlugin | None = kwargs.get("fsdp_plugin")
    if plugin is None or self.distributed_type != DistributedType.MULTI_CPU:
        return
    self.fsdp_plugin = plugin
    self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.device = PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 takes no index


def allow_fsdp_on_cpu() -> None:
    """From now on an FSDP plugin is honoured on gloo, and our rule against it is off."""
    AcceleratorState.__init__ = _init
    checks.REQUEST_RULES = tuple(
        rule for rule in request_rules.REQUEST_RULES if rule is not request_rules.fsdp_has_gpus
    )
