"""GPU memory that a training process takes. Skips itself without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.inputs.families import FAMILIES, read_shape
from launch.inputs.model_shape import ModelShape
from launch.planning.activations import attention_bytes, layer_activation_bytes
from launch.planning.auto_settings import Gpus, kernels_of
from launch.planning.memory_load import load_of
from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.saved import saved_bytes
from tests.helpers.tiny_families import write_tiny
from trainer.model.base import RECIPE_DTYPES, load_base, prepare_training
from trainer.model.dropout import SampleDropout
from trainer.model.lora import add_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_segments_of_gpu_memory_can_grow_in_a_training_process() -> None:
    program = (
        "import os\n"
        "os.environ.pop('PYTORCH_ALLOC_CONF', None)\n"
        "import trainer.train, torch\n"
        "torch.empty(1, device='cuda')\n"
        "print(any(part['is_expandable'] for part in torch.cuda.memory._snapshot()['segments']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["True"], ended.stderr


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_layer_through_the_fused_kernels_is_planned_to_keep_what_autograd_saves(
    kind: str, world: Path, tmp_path: Path
) -> None:
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(write_tiny(kind, tmp_path / "base"))
    values["model"]["dtype"] = "bfloat16"
    values["quantization"] = {"load_in_4bit": True}
    values["lora"] = {"lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    recipe = recipe_from_dict(values)
    device = torch.device("cuda", 0)
    model = add_lora(load_base(recipe, device), recipe).train()
    way = prepare_training(model, recipe, compute_dtype=RECIPE_DTYPES["bfloat16"])
    keys = next(module.keys for module in model.modules() if isinstance(module, SampleDropout))
    shape, kernels = read_shape(recipe), kernels_of(recipe, Gpus("cuda"))
    assert isinstance(shape, ModelShape)
    assert kernels.fused == ("fused kernels" in way)
    load = load_of(recipe, shape, "single", 1, kernels)
    planned = layer_activation_bytes(load) + attention_bytes(load)
    assert saved_bytes(model, keys, device) == pytest.approx(planned, rel=0.02)
