"""The passes between products against PyTorch's own: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, silu

from trainer.model import pass_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_swiglu_and_its_gradients_are_pytorchs() -> None:
    sides = [_random(3, 7, 150, seed=seed).requires_grad_() for seed in (0, 1)]
    gradient = _random(3, 7, 150, seed=2)
    expected = silu(sides[0]) * sides[1]
    found = pass_kernels.swiglu(*(side * 1 for side in sides))
    torch.testing.assert_close(found, expected)
    of_expected = torch.autograd.grad(expected, sides, gradient)
    for one, other in zip(torch.autograd.grad(found, sides, gradient), of_expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("added", [False, True])
def test_a_layer_norm_and_the_addition_before_it_are_pytorchs(added: bool) -> None:
    x, weight, bias = _random(9, 100, seed=0) + 5, _random(100, seed=1), _random(100, seed=2)
    residual = _random(9, 100, seed=3) if added else None
    total, found = pass_kernels.layer_norm(x, residual, weight, bias, 1e-6)
    expected = x if residual is None else x + residual
    assert torch.equal(total, expected)
    torch.testing.assert_close(found, layer_norm(expected, (100,), weight, bias, 1e-6), rtol=1e-5, atol=1e-5)


def test_what_is_added_after_a_layer_norm_is_in_the_sum_and_not_in_the_norm() -> None:
    x, residual, after = _random(9, 100, seed=0), _random(9, 100, seed=1), _random(100, seed=2)
    weight, bias = _random(100, seed=3), _random(100, seed=4)
    total, found = pass_kernels.layer_norm(x, residual, weight, bias, 1e-6, after)
    assert torch.equal(total, x + residual + after)
    assert torch.equal(found, pass_kernels.layer_norm(x, residual, weight, bias, 1e-6)[1])
