"""Merging into a base of each family: PEFT's numbers, the hub's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.merging import WEIGHTS, make_adapter, merge, merged_by_peft
from tests.helpers.tiny_families import hub_names, write_tiny
from trainer.export.requantize import quantized_modules
from trainer.formats.key_names import memory_name
from trainer.formats.optimizer_state import parameter_order
from trainer.model.base import load_base

VLLM = {
    "qwen2_5_vl": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
        "visual.": "visual.",
    },
    "qwen3_vl": {
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
    },
}
"""`hf_to_vllm_mapper` of vLLM's `qwen2_5_vl.py` and `qwen3_vl.py`: the first prefix that fits names the module. A
merged model keeps its base's names: those of the hub, which for Qwen3-VL are transformers' own."""


@pytest.mark.parametrize("kind", VLLM)
def test_an_adapter_on_every_linear_layer_merges_as_peft_does_under_the_names_that_vllm_maps(
    kind: str, tmp_path: Path
) -> None:
    base = write_tiny(kind, tmp_path / "base")
    if kind == "qwen2_5_vl":
        hub_names(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    report = merge(adapter, tmp_path / "merged")
    pairs = load_file(adapter / WEIGHTS)
    assert report.changed == report.pairs == len(pairs) // 2
    assert sum(".visual." in key for key in pairs) > 20
    written = load_file(tmp_path / "merged/model.safetensors")
    assert written.keys() == load_file(base / "model.safetensors").keys()
    expected = merged_by_peft(base, adapter)
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[memory_name(name)], rtol=0, atol=1e-6)
        prefix = next(prefix for prefix in VLLM[kind] if name.startswith(prefix))
        assert VLLM[kind][prefix] in ("visual.", "language_model.model.", "language_model.lm_head.")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    assert loaded.keys() == expected.keys()
    keys = sorted(pairs)
    order = parameter_order(keys)
    assert order is not None
    assert sorted(order) == keys


@pytest.mark.parametrize("kind", VLLM)
def test_what_dequantized_merging_rounds_is_what_training_quantizes(
    kind: str, world: Path, tmp_path: Path
) -> None:
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(write_tiny(kind, tmp_path / "base"))
    values["quantization"]["load_in_4bit"] = True
    model = load_base(recipe_from_dict(values), torch.device("cpu"))
    held = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert quantized_modules(tmp_path / "base") == held
    assert sum("visual" in name for name in held) > 8
