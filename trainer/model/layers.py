"""Decoder layers read and quantized one after another: no process need ever hold more than one of them whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from launch.errors import ConfigError
from trainer.model.families.registry import modelling_of

_LAYERS = ("model.layers.", "model.language_model.layers.")
"""How a decoder layer's tensors begin: on the hub, and as transformers 5 writes them."""


def keep_cpu_weights(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from repacking 4-bit weights at the first evaluation forward on a CPU with avx512_bf16:
    training after it has no gradient through them, without an error. See `Linear4bit.forward`; test: evaluate, then
    train.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_of_layer(key: str) -> bool:
    """Say whether a tensor's name is that of a decoder layer's."""
    return key.startswith(_LAYERS)


def append_layers(
    model: PreTrainedModel,
    path: Path,
    kinds: Sequence[str | None],
    quantization: BitsAndBytesConfig | None,
    device: torch.device,
) -> Iterator[nn.Module]:
    """Give a model without decoder layers those of its `kinds` (None: all are alike) from `path`; yields each whole.

    Whoever takes a layer shards it before asking for the next.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kinds)
    if hasattr(config, "layer_types"):
        config.layer_types = list(kinds)
    make = modelling_of(model).decoder_layer
    files = _files_of_layers(path)
    for number in range(len(kinds)):
        with torch.device("meta"):
            layer = make(config, number).to(model.dtype)
        if quantization is not None:
            layer = replace_with_bnb_linear(layer, [], quantization, pre_quantized=False)
        _fill(layer, files.get(number, {}), device, model.dtype, f"{path}: decoder layer {number}")
        layer.requires_grad_(False)
        keep_cpu_weights(layer)
        model.model.language_model.layers.append(layer)
        yield layer


def _files_of_layers(path: Path) -> dict[int, dict[str, tuple[Path, str]]]:
    """{layer: {name within the layer: (file, name in the file)}} from the headers of all weight files."""
    files_by_layer: dict[int, dict[str, tuple[Path, str]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                prefix = next((begin for begin in _LAYERS if key.startswith(begin)), None)
                if prefix:
                    number, _, name = key.removeprefix(prefix).partition(".")
                    files_by_layer.setdefault(int(number), {})[name] = (file, key)
    return files_by_layer


def _fill(
    layer: nn.Module,
    files: dict[str, tuple[Path, str]],
    device: torch.device,
    dtype: torch.dtype,
    where: str,
) -> None:
    """Read a layer's tensors onto the device, those of 4-bit modules quantized there, as transformers does."""
    parameters = dict(layer.named_parameters())
    if odd := sorted(parameters.keys() ^ files.keys()):
        raise ConfigError(
            f"model.name_or_path: {where} has other tensors than a layer of its family ({len(odd)} missing or unknown, "
            f"such as {odd[0]}); get the model again"
        )
    for name, empty in parameters.items():
        file, key = files[name]
        with safe_open(file, "pt", device="cpu") as opened:
            value: Tensor = opened.get_tensor(key).to(device, dtype)
        module_name, _, own = name.rpartition(".")
        module = layer.get_submodule(module_name)
        is_matrix = own == "weight" and isinstance(module, nn.Linear)  # packed, it has another shape
        expected = (module.out_features, module.in_features) if is_matrix else empty.shape
        if tuple(value.shape) != tuple(expected):
            raise ConfigError(
                f"model.name_or_path: {where} has {name} of shape {tuple(value.shape)}, not {tuple(expected)}; "
                "get the model again"
            )
        if isinstance(empty, Params4bit):
            new: nn.Parameter = Params4bit(value, requires_grad=False, **empty.__dict__).to(device)
        else:
            new = nn.Parameter(value, requires_grad=False)
        setattr(module, own, new)
