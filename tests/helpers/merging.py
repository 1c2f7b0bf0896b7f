"""What the tests of merging share: adapters of random numbers as PEFT saves them, and PEFT's own merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from trainer.export import merge as merging
from trainer.export.adapter import AdapterOverrides
from trainer.export.merge_plan import MergeRequest
from trainer.export.verify import MergeReport

WEIGHTS = "adapter_model.safetensors"


def make_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """A PEFT adapter of random numbers, saved by PEFT, naming `base`."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | lora
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data = change if ".lora_A." in name or ".lora_B." in name else parameter.data + change
    adapted.save_pretrained(folder, save_embedding_layers=False)
    change_config(folder, base_model_name_or_path=str(base))
    return folder


def change_config(folder: Path, file: str = "adapter_config.json", **values: Any) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | values))


def rename_keys(folder: Path, rename: Callable[[str], str], file: str = WEIGHTS) -> None:
    tensors = load_file(folder / file)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / file, {"format": "pt"})


def merge(source: Path, output: Path, *, base_model: str | None = None, **asked: Any) -> MergeReport:
    return merging.merge(
        MergeRequest(source, output, missing=AdapterOverrides(base_model=base_model), **asked)
    )


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    state: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return state
