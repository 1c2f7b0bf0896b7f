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
    """A matrix or vector: sizes, those that grow with the micro-batch by name; `turned`: a transposed view.

    `pitch`: from one row in memory to the next, of one column to the next where turned; 0 of a vector.
    """

    sizes: tuple[int | str, ...]
    turned: bool
    pitch: int | str
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
        sizes = tuple(self._names.get(size, size) for size in x.shape)
        if x.dim() != 2:
            return _Operand(sizes, False, 0, x.dtype)
        turned = x.stride(0) == 1 and x.stride(1) != 1
        lying = x.t() if turned else x
        pitch = max(lying.stride(0), lying.shape[1])  # an expanded gradient has strides of 0
        return _Operand(sizes, turned, self._names.get(pitch, pitch), x.dtype)


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
    *shape, pitch = (
        sizes[size] if isinstance(size, str) else size for size in (*operand.sizes, operand.pitch)
    )
    if len(shape) != 2:
        return torch.empty(shape, dtype=operand.dtype, device=device)
    rows, columns = shape[::-1] if operand.turned else shape
    lying = torch.empty(rows, pitch, dtype=operand.dtype, device=device)[:, :columns]
    return lying.t() if operand.turned else lying
