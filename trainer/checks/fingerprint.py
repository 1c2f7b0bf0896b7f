"""A few numbers that stand for a large tensor, so that two of them can be compared where only one is."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

_LENGTHS = (8191, 8179, 8171, 8167)  # primes: no width of a layer is a multiple


def projections(values: Tensor) -> Tensor:
    """Return [norm, four sums with random signs] of a tensor in fp32, float64 [5] on its device. Waits for no device.

    Two tensors that differ by d have sums that differ by about the norm of d (a random projection; Johnson,
    Lindenstrauss 1984), so their relative difference can be told without keeping either.
    """
    flat = values.detach().float().reshape(-1)
    sums = [torch.linalg.vector_norm(flat.double())]
    for length in _LENGTHS:
        padded = nn.functional.pad(flat, (0, -len(flat) % length)).view(-1, length)
        sums.append(padded.sum(0, dtype=torch.float64) @ _signs(length, flat.device))
    return torch.stack(sums)


def fingerprint(values: Tensor) -> list[float]:
    """Return the `projections` of a tensor as numbers."""
    numbers: list[float] = projections(values).tolist()
    return numbers


@cache
def _signs(length: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return (torch.randint(0, 2, (length,), generator=generator) * 2 - 1).double().to(device)
