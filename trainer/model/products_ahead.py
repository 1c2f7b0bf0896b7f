"""Matrix products of the coming micro-batches, computed once on no data, so that their kernels are loaded.

cuBLAS (13, on Hopper) takes another kernel for nearly every number of rows: 222 of them in 60 micro-batches of the 7B
shape. CUDA loads each at its first use, 3 to 5 ms of the host, and waits for all that the GPU was given before: a step
of few samples then computes at the host's pace. `CUDA_MODULE_LOADING=EAGER` does not reach them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
}


class _Operand(NamedTuple):
    """A matrix or vector: sizes, those that grow with the micro-batch by name; `turned`: a transposed view."""

    sizes: tuple[int | str, ...]
    turned: bool
    dtype: torch.dtype


class _Product(NamedTuple):
    function: Any
    operands: tuple[_Operand, ...]


class SeenProducts(TorchDispatchMode):
    """Records within `with` which products a micro-batch takes, forward and backward.

    `sizes`: how many rows of each kind it has, by name (tokens, visual tokens, patches): a size of an operand that is
    one of them is taken for it.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self._names = {size: name for name, size in sizes.items()}
        self.products: set[_Product] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute as without it."""
        if function in _PRODUCTS:
            operands = [self._operand(each) for each in args if isinstance(each, Tensor)]
            if any(isinstance(size, str) for each in operands if each for size in each.sizes):
                self.products.add(_Product(function, tuple(each for each in operands if each)))
        return function(*args, **(kwargs or {}))

    def _operand(self, x: Tensor) -> _Operand:
        turned = x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous()
        return _Operand(tuple(self._names.get(size, size) for size in x.shape), turned, x.dtype)


@torch.no_grad()
def compute_ahead(
    products: Iterable[_Product], coming: Iterable[Mapping[str, int]], device: torch.device
) -> None:
    """Compute each product once, on whatever is in memory, for each of the coming micro-batches by their sizes.

    Ends where there is no memory for it.
    """
    try:
        for sizes in coming:
            for function, operands in products:
                function(*[_empty(operand, sizes, device) for operand in operands])
    except torch.OutOfMemoryError:
        return


def _empty(operand: _Operand, sizes: Mapping[str, int], device: torch.device) -> Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in operand.sizes]
    if operand.turned:
        return torch.empty(shape[::-1], dtype=operand.dtype, device=device).t()
    return torch.empty(shape, dtype=operand.dtype, device=device)
