"""The Triton kernels against their plain forms: on a GPU, or in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from trainer.model import kernels
from trainer.model.dropout import DRAWS, channel_words, keep_mask, module_keys, row_keys, token_keys

TOKENS, CHANNELS, RANK, DROPPED = 70, 201, 8, 6000  # no multiple of any tile
SCALE = DRAWS / (DRAWS - DROPPED)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    """An activation, its row keys and words, an adapter and a gradient."""
    draw = torch.Generator().manual_seed(0)
    tokens = token_keys(1, 2, torch.arange(TOKENS) // 10, torch.arange(TOKENS) % 10)
    rows = row_keys(tokens, module_keys(["a", "b"]))[1]
    tensors = {
        "x": torch.randn(TOKENS, CHANNELS, generator=draw),
        "rows": rows,
        "words": channel_words((CHANNELS + 1) // 2, torch.device("cpu")),
        "keep": keep_mask(rows, CHANNELS, DROPPED),
        "down": torch.randn(RANK, CHANNELS, generator=draw),
        "inner": torch.randn(TOKENS, RANK, generator=draw),
    }
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def test_the_mask_of_the_kernels_is_that_of_the_plain_form_to_the_bit(case: dict[str, torch.Tensor]) -> None:
    ones = torch.ones(TOKENS, CHANNELS, device=DEVICE)
    for begin in range(0, CHANNELS, 16):
        width = min(16, CHANNELS - begin)
        pick = torch.zeros(16, CHANNELS, device=DEVICE)
        pick[range(width), range(begin, begin + width)] = 1
        seen = kernels.project(ones, pick, case["rows"], case["words"], DROPPED, 1.0, 1.0)[:, :width]
        assert torch.equal(seen, case["keep"][:, begin : begin + width].float())


@pytest.mark.parametrize("dropped", [0, DROPPED])
def test_a_projection_and_its_gradients_are_those_of_the_plain_form(
    case: dict[str, torch.Tensor], dropped: int
) -> None:
    factor = case["keep"] * SCALE if dropped else torch.ones(TOKENS, CHANNELS, device=DEVICE)
    mask = (case["rows"], case["words"], dropped, SCALE, 2.0)
    x, down, inner = (case[name] for name in ("x", "down", "inner"))
    close = {"rtol": 1e-5, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 1e-2, "atol": 5e-2}  # TensorFloat32
    torch.testing.assert_close(kernels.project(x, down, *mask), 2 * (x * factor) @ down.t(), **close)
    torch.testing.assert_close(
        kernels.adapter_gradient(x, inner, *mask), 2 * inner.t() @ (x * factor), **close
    )
    gradient = torch.ones(TOKENS, CHANNELS, device=DEVICE)
    kernels.add_back(gradient, inner, down, *mask)
    torch.testing.assert_close(gradient, 1 + 2 * factor * (inner @ down), **close)


@pytest.mark.parametrize("added", [False, True])
def test_a_norm_passes_back_what_autograd_finds(added: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 100, generator=draw).to(DEVICE).requires_grad_()
    gradient, residual = torch.randn(2, 2, 9, 100, generator=draw).to(DEVICE)
    weight = torch.randn(100, generator=draw).to(DEVICE)
    deviations = x.detach().pow(2).mean(-1).add(1e-6).rsqrt()
    (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).backward(gradient)
    assert x.grad is not None
    expected = x.grad + residual if added else x.grad
    rest = residual if added else None
    found = kernels.norm_gradient(gradient.clone(), rest, x.detach(), weight, deviations.flatten())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_towers_queries_and_keys_are_turned_as_transformers_does(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(9, 3, 5, 12, generator=draw).to(DEVICE, dtype)
    angles = torch.randn(9, 6, generator=draw).to(DEVICE).repeat(1, 2)
    query, key, value = kernels.rotate(qkv, angles.cos(), angles.sin())
    turned = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], angles.cos(), angles.sin())
    close = (
        {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    )  # one rounding
    for found, expected in zip((query, key), turned, strict=True):
        torch.testing.assert_close(found, expected, **close)
    assert torch.equal(value, qkv[:, 2])


def test_the_towers_activation_is_torchs_own(case: dict[str, torch.Tensor]) -> None:
    x = case["x"]
    torch.testing.assert_close(kernels.quick_gelu(x), x * torch.sigmoid(1.702 * x))
