"""Portable checkpoints: the adapter in PEFT's format and the optimizer state by parameter name.

Small (30 MB for the 7B recipe), independent of strategy and world size, and made of JSON and safetensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.checkpoints.adapter_file import ADAPTER_WEIGHTS
from launch.checkpoints.manifest import OPTIMIZER_FILE
from launch.errors import CheckpointError, RunError
from launch.untrusted_files import printable
from trainer.formats.key_names import ADAM_STATE_KEYS
from trainer.formats.validated import read_tensors


@dataclass(frozen=True)
class TrainedState:
    """What trains, as it was at the end of a step: copies in memory, which the next steps do not touch.

    `adapter`: the trained parameters by their name in the model; `optimizer`: `<parameter>.<state key or step>`.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def copy_trained_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> TrainedState:
    """Copy weights and optimizer state of every trained parameter to the CPU."""
    optimizer_state = {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in parameters.items()
        for key in (*ADAM_STATE_KEYS, "step")
    }
    return TrainedState(_copied(parameters), _copied(optimizer_state))


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_state(model: PeftModel, state: TrainedState, folder: Path) -> None:
    """Write the adapter and the optimizer of a snapshot.

    Raises:
        RunError: the adapter read back is not the snapshot's.
    """
    save_adapter(model, folder, state.adapter)
    save_file(state.optimizer, folder / OPTIMIZER_FILE)


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, and compare what was written with what was meant.

    `weights`: parameters by name to write instead of the model's own.

    Raises:
        RunError: the file read back is another adapter.
    """
    # `save_embedding_layers` would ask the hub whether the vocabulary was resized.
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    written = read_tensors(folder / ADAPTER_WEIGHTS)
    meant = get_peft_model_state_dict(model, save_embedding_layers=False, state_dict=weights)
    if differing := sorted(_differing(written, meant)):
        raise RunError(
            f"{folder / ADAPTER_WEIGHTS}: {len(differing)} of {len(meant)} tensors were not written as they are "
            f"({differing[0]}, ...); the disk or the adapter is damaged"
        )


def save_adapter_config(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` alone, as `save_adapter` does."""
    config = copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.get_base_model().config._name_or_path
    config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter into a model that has the same LoRA layers, in fp32.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape.
    """
    set_adapter(model, _read(folder / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS)


def set_adapter(
    model: PeftModel, stored: Mapping[str, Tensor], where: Path, adapter_name: str = "default"
) -> None:
    """As `load_adapter`, of tensors by their keys in an adapter file; `where` they were read."""
    present = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    wrong = [
        *(f"{name} is missing" for name in sorted(present.keys() - stored.keys())),
        *(f"{name} is unknown" for name in sorted(stored.keys() - present.keys())),
        *(
            f"{name} has shape {tuple(stored[name].shape)}, the model's has {tuple(tensor.shape)}"
            for name, tensor in sorted(present.items())
            if name in stored and stored[name].shape != tensor.shape
        ),
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: does not fit the model ({len(wrong)} tensors: {printable(wrong[0])}); "
            "resume with the recipe that wrote it"
        )
    set_peft_model_state_dict(model, dict(stored), adapter_name=adapter_name)
    loaded = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if differing := sorted(_differing(stored, loaded)):
        raise CheckpointError(f"{where}: {differing[0]} was not loaded as it was stored")


def _differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Iterator[str]:
    yield from left.keys() ^ right.keys()
    for name in left.keys() & right.keys():
        if not torch.equal(left[name].cpu(), right[name].detach().cpu().to(left[name].dtype)):
            yield name


def _read(file: Path) -> dict[str, Tensor]:
    return read_tensors(file, "resume from another checkpoint")


def read_optimizer_state(parameters: Mapping[str, torch.Size], folder: Path) -> dict[str, Tensor]:
    """Read the optimizer state of these parameters (name -> shape), as `<parameter>.<exp_avg, exp_avg_sq or step>`.

    Raises:
        CheckpointError: the file holds other parameters or shapes.
    """
    return matching_optimizer_state(_read(folder / OPTIMIZER_FILE), parameters, folder / OPTIMIZER_FILE)


def matching_optimizer_state(
    stored: dict[str, Tensor], parameters: Mapping[str, torch.Size], where: Path
) -> dict[str, Tensor]:
    """Return `stored` if it is the optimizer state of these parameters; CheckpointError as `read_optimizer_state`."""
    expected = {f"{name}.{key}" for name in parameters for key in (*ADAM_STATE_KEYS, "step")}
    if expected != stored.keys():
        odd = sorted(expected ^ stored.keys())
        raise CheckpointError(
            f"{where}: holds other parameters than the model trains ({len(odd)} differ, such as "
            f"{printable(odd[0])}); resume with the recipe that wrote it"
        )
    for name, shape in parameters.items():
        for key in ADAM_STATE_KEYS:
            if stored[f"{name}.{key}"].shape != shape:
                raise CheckpointError(
                    f"{where}: {name}.{key} has shape {tuple(stored[f'{name}.{key}'].shape)}, the "
                    f"parameter {tuple(shape)}; resume with the recipe that wrote it"
                )
    return stored


def set_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    optimizer_state: Mapping[str, Tensor],
) -> None:
    """Set the state of a fresh optimizer over the same parameters to that of `read_optimizer_state`."""
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {
            "step": optimizer_state[f"{name}.step"].to(step_device(optimizer, parameter))
        }
        for key in ADAM_STATE_KEYS:
            state[key] = optimizer_state[f"{name}.{key}"].to(parameter.device, parameter.dtype)
        optimizer.state[parameter] = state


def step_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """AdamW counts steps on the parameter's device when fused, else on the CPU (`torch.optim.AdamW.__init__`)."""
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return parameter.device if fused else torch.device("cpu")
