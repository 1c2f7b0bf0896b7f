"""`trainer.model.products_ahead`: the products of a micro-batch, computed for others."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from trainer.model import products_ahead
from trainer.model.products_ahead import SeenProducts, compute_ahead

CPU = torch.device("cpu")


def micro_batch(tokens: int, patches: int) -> None:
    """Layers of tokens with and without a bias, forward and backward, one of patches, and a product of weights."""
    x = torch.ones(1, tokens, 5, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    linear(linear(x, weight, bias), weight.t()).sum().backward()
    out, inner = torch.ones(tokens, 3), torch.ones(tokens, 2)
    out.addmm_(inner, torch.ones(3, 2).t())
    out.t().mm(inner)
    linear(torch.ones(patches, 7), torch.ones(4, 7))
    weight.mm(weight.t())


def test_the_products_of_one_micro_batch_are_those_computed_for_another() -> None:
    with SeenProducts({"tokens": 21, "patches": 88}) as seen:
        micro_batch(21, 88)
    with SeenProducts({"tokens": 34, "patches": 40}) as of_another:
        micro_batch(34, 40)
    assert seen.products == of_another.products
    assert len(seen.products) >= 6
    with SeenProducts({"tokens": 34, "patches": 40}) as ahead:
        compute_ahead(seen.products, [{"tokens": 34, "patches": 40}], CPU)
    assert ahead.products == of_another.products
    assert not any("sum" in str(each.function) for each in seen.products)


def test_without_memory_fewer_are_computed_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with SeenProducts({"tokens": 21}) as seen:
        micro_batch(21, 88)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(products_ahead, "_empty", no_memory)
    compute_ahead(seen.products, [{"tokens": 34}], CPU)
