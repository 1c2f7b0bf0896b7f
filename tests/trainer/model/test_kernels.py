"""The Triton kernels against their plain forms: on a GPU, or in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from trainer.model import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def test_the_towers_activation_is_torchs_own() -> None:
    x = torch.randn(70, 201, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch.testing.assert_close(kernels.quick_gelu(x), x * torch.sigmoid(1.702 * x))
