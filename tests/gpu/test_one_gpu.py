"""What only a GPU can show: the variable-length kernel, bf16, and resuming to the byte. Skips itself without one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from trainer.data.encoder import Encoder
from trainer.data.packing import cumulative, pack
from trainer.data.splits import open_split
from trainer.metrics_log import read_lines
from trainer.model.attention import Segments, _loop, varlen
from trainer.model.base import RECIPE_DTYPES, compute_in, load_base, prepare_training
from trainer.model.dropout import DropoutKeys, SampleDropout, keep_mask
from trainer.model.lora import add_lora
from trainer.prepare import prepare
from trainer.pretrained import load_processor
from trainer.train import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LENGTHS = (37, 128, 1, 300)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (16, 16, 80), (4, 2, 16)])
def test_the_kernel_attends_as_the_loop_does(causal: bool, heads: int, kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    segments = Segments(cumulative(LENGTHS).cuda(), LENGTHS)
    shapes = ((total, heads, head_dim), (total, kv_heads, head_dim), (total, kv_heads, head_dim))
    exact = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    half = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in exact]
    weight = torch.randn(total, heads, head_dim, device="cuda")
    expected = _loop(exact[0], exact[1], exact[2], segments, causal, head_dim**-0.5)
    found = varlen(half[0], half[1], half[2], segments, causal, head_dim**-0.5)
    (expected * weight).sum().backward()
    (found.float() * weight).sum().backward()
    for name, mine, theirs in [
        ("output", found, expected),
        *((f"gradient {n}", h.grad, e.grad) for n, h, e in zip("qkv", half, exact, strict=True)),
    ]:
        assert mine is not None
        assert theirs is not None
        apart = (mine.float() - theirs).norm() / theirs.norm()
        assert apart < 1e-2, f"{name}: {apart}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_the_cpus_to_the_bit(dtype: torch.dtype) -> None:
    """Keys, masks, values and gradients, at the width of the 7B model and at an odd one."""
    names = [f"layers.{layer}.self_attn.{name}" for layer in range(28) for name in ("q_proj", "v_proj")]
    samples = torch.tensor([17, 2**40, 0, 28_298]).repeat_interleave(torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    generator = torch.Generator().manual_seed(0)
    for channels, p in ((3584, 0.05), (333, 0.5)):
        x = torch.randn(1, len(samples), channels, generator=generator).to(dtype)
        found = {}
        for device in ("cpu", "cuda"):
            keys = DropoutKeys(42, names)
            keys.current = keys.of(11, samples.to(device), positions.to(device))
            module = SampleDropout(p, names[-1], len(names) - 1, keys)
            leaf = x.detach().to(device).requires_grad_()
            y = module(leaf)
            (gradient,) = torch.autograd.grad(y, leaf, y.detach())
            keep = keep_mask(keys.current[0], channels, module.dropped)
            found[device] = [tensor.detach().cpu() for tensor in (keys.current, keep, y, gradient)]
        for on_cpu, on_cuda in zip(*found.values(), strict=True):
            assert torch.equal(on_cpu, on_cuda)


def test_dropout_does_not_wait_for_the_device() -> None:
    keys = DropoutKeys(42, ["layers.0.self_attn.q_proj"])
    samples, positions = torch.zeros(900, dtype=torch.int64).cuda(), torch.arange(900).cuda()
    module = SampleDropout(0.05, "layers.0.self_attn.q_proj", 0, keys)
    x = torch.randn(900, 512, device="cuda", requires_grad=True)
    keys.current = keys.of(0, samples, positions)
    module(x).sum().backward()  # the constants travel to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        keys.current = keys.of(1, samples, positions)
        module(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    values = recipe_values(world)
    values["model"]["dtype"] = "bfloat16"
    values["quantization"] = {"load_in_4bit": True}
    values["lora"] = {"lora_dropout": 0.0}
    return recipe_from_dict(values)


def test_a_packed_micro_batch_in_bf16_gives_the_losses_of_its_samples_alone(recipe: Recipe) -> None:
    prepare(recipe, quiet=True)
    encoder = Encoder(load_processor(recipe), recipe.data.system_message, "sequence")
    rows = open_split(recipe, "train")
    samples = [encoder(rows[number]) for number in range(6)]
    device = torch.device("cuda", 0)
    processor = encoder.processor

    def stock() -> list[float]:
        model = add_lora(load_base(recipe, device), recipe).eval()
        losses = []
        for sample in samples:
            ids = sample.input_ids[None].to(device)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                logits = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=sample.images[0].pixel_values.to(device, torch.bfloat16),
                    image_grid_thw=torch.tensor([sample.images[0].grid], device=device),
                    mm_token_type_ids=(ids == processor.image_token_id).int(),
                ).logits[0]
            labels = sample.labels[1:].to(device)
            losses.append(torch.nn.functional.cross_entropy(logits[:-1].float(), labels).item())
        return losses

    def packed() -> list[float]:
        model = add_lora(load_base(recipe, device), recipe).eval()
        prepare_training(model, recipe)
        compute_in(model, RECIPE_DTYPES["bfloat16"])
        inputs: dict[str, Any] = dict(
            pack(
                samples,
                sample_ids=range(6),
                step=-1,
                masked=False,
                image_token_id=processor.image_token_id,
                merge=2,
            )
        )
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        labels = inputs.pop("shift_labels")[0]
        with torch.no_grad():
            logits = model(**inputs).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return [part.mean().item() for part in losses.split([sample.target_tokens for sample in samples])]

    assert packed() == pytest.approx(stock(), rel=2e-3)


def test_a_resumed_run_is_the_straight_run_to_the_byte_when_deterministic(
    world: Path, tmp_path: Path, recipe: Recipe
) -> None:
    values = recipe.model_dump(mode="json")
    values["training"] |= {"deterministic": True, "gradient_checkpointing": True}
    values["lora"]["lora_dropout"] = 0.05
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_from_dict(values)))
    assert main([str(file), "--runs-dir", str(tmp_path), "--name", "straight"]) == 0
    straight, cut = RunDirectory(tmp_path / "straight"), RunDirectory(tmp_path / "cut")
    shutil.copytree(straight.path, cut.path)
    shutil.rmtree(cut.checkpoint(6))
    shutil.rmtree(cut.adapter)
    assert main([str(file), "--runs-dir", str(tmp_path), "--name", "cut"]) == 0
    assert [line["loss"] for line in read_lines(cut.metrics_file)] == [
        line["loss"] for line in read_lines(straight.metrics_file)
    ]
    shas = [
        hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        for run in (straight, cut)
    ]
    assert shas[0] == shas[1]
