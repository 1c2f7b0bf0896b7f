"""Optimizer state of imported checkpoints by parameter name: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`.

The same keys as `optimizer.safetensors` of our portable checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from launch.inputs.families import FAMILIES, Family
from trainer.formats.key_names import ADAM_STATE_KEYS, PREFIX, adapter_key, lora_part, parameter_name
from trainer.formats.torch_files import as_number

_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def by_name(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Read an optimizer state whose keys are parameter names; {} unless every one has AdamW's state."""
    optimizer_state: dict[str, Tensor] = {}
    for raw, values in state.items():
        if not isinstance(raw, str) or not isinstance(values, Mapping):
            return {}
        name = parameter_name(adapter_key(raw)[0])
        step = as_number(values.get("step"))
        if any(not isinstance(values.get(key), Tensor) for key in ADAM_STATE_KEYS) or step is None:
            return {}
        optimizer_state |= {f"{name}.{key}": values[key] for key in ADAM_STATE_KEYS}
        optimizer_state[f"{name}.step"] = torch.as_tensor(step)
    return optimizer_state


def by_index(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the state in `optimizer.pt`, whose parameters are numbers in the order of the model's parameters.

    `tensors`: the adapter, by its keys. Transformers' Trainer puts parameters with weight decay into the first
    group; LoRA's all are. {} where that is not so, or where a state's shape is not its parameter's.
    """
    groups, states = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(states, Mapping):
        return {}
    parameters = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
    if not parameters or not isinstance(parameters[0], list) or any(parameters[1:]):
        return {}
    order, numbers = parameter_order(tensors), parameters[0]
    if order is None or len(order) != len(numbers):
        return {}
    state_by_key: dict[str, Any] = {
        key: states.get(number) for key, number in zip(order, numbers, strict=True)
    }
    for key, values in state_by_key.items():
        moment = values.get("exp_avg") if isinstance(values, Mapping) else None
        if getattr(moment, "shape", None) != tensors[key].shape:
            return {}
    return by_name(state_by_key)


def parameter_order(keys: Iterable[str]) -> list[str] | None:
    """Sort the keys of an adapter in the order of a PeftModel's parameters; None when no family has all of them.

    The order is that of the modules in the installed transformers, whatever their sizes: an empty model tells it.
    Where several families have them all, as those of the decoder layers, their order is the same.
    """
    keys = list(keys)
    orders = (_order_in(family, keys) for family in FAMILIES.values())
    return next((order for order in orders if order is not None), None)


def _order_in(family: Family, keys: list[str]) -> list[str] | None:
    numbers = (int(n) for key in keys for n in re.findall(r"\.(?:layers|blocks)\.(\d+)\.", key))
    depth = 1 + max(numbers, default=0)
    sizes = {"text_config": {"num_hidden_layers": depth}, "vision_config": {"depth": depth}}
    with torch.device("meta"):
        model = getattr(transformers, family.model_class)(getattr(transformers, family.config_class)(**sizes))
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}

    def place(key: str) -> tuple[int, int]:
        if (lora := lora_part(key)) is not None:
            return places[lora[0]], _PARTS.index(lora[1])
        module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
        own = [name for name, _ in model.get_submodule(module).named_parameters()]
        return places[module], own.index(parameter)

    try:
        return sorted(keys, key=place)
    except (KeyError, ValueError, AttributeError):
        return None
