"""Which attention kernels this process computes with, where they are chosen by what a GPU shows at their first use.

They differ in rounding: who compares two runs to the bit must be able to read which of them computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_CHOSEN: dict[str, str] = {}


def record_kernel(part: str, kernel: str) -> None:
    """Note which kernel attends in a part of the model."""
    _CHOSEN[part] = kernel


def chosen_kernels() -> dict[str, str]:
    """Return the kernels by the part of the model; parts whose kernel is never chosen are not in it."""
    return dict(sorted(_CHOSEN.items()))


def describe_disagreement(kernels_by_rank: Sequence[Mapping[str, str]]) -> str:
    """Say which ranks attend with another kernel than rank 0, and with which; empty where all agree."""
    first, *others = kernels_by_rank
    parts = [
        f"{part} of rank {rank}: {kernels.get(part, 'none')} (rank 0: {first.get(part, 'none')})"
        for rank, kernels in enumerate(others, start=1)
        for part in sorted(first.keys() | kernels.keys())
        if kernels.get(part) != first.get(part)
    ]
    return "; ".join(parts)
